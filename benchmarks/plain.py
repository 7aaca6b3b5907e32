"""The bare work of a step, as anybody would write it: stock diffusers modules in one process, no engine, no sharding.

Shapes: B batch, C latent channels, H and W latent height and width, S text tokens, E embedding channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks.workload import CHANNELS, Span, Workload
from ppcl_ds.units.loss import boundary_loss

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Latents:
    """What the teacher reads.

    Attributes:
        noisy: (B, C, H, W).
        embeds: (B, S, E) prompt embeddings without padding.
        sigmas: (B,) noise levels.
    """

    noisy: Tensor
    embeds: Tensor
    sigmas: Tensor

    @staticmethod
    def random(work: Workload, generator: torch.Generator, device: torch.device = CPU) -> Latents:
        """A micro-batch of the workload's shapes and precision, drawn on the CPU."""
        noisy = torch.randn(work.micro_batch, CHANNELS, work.side, work.side, generator=generator)
        embeds = torch.randn(work.micro_batch, work.words, work.width, generator=generator)
        sigmas = torch.rand(work.micro_batch, generator=generator)  # float32 in every precision, as in a run
        return Latents(noisy.to(device, work.dtype), embeds.to(device, work.dtype), sigmas.to(device))


@dataclass
class Reading:
    """What one teacher forward left: for each block its arguments by name, and its output (text, image)."""

    arguments: dict[int, dict[str, Any]]
    outputs: dict[int, tuple[Tensor, Tensor]]


class PlainStudents:
    """A stock Qwen-Image teacher, and for each span a trainable copy of its first block.

    Attributes:
        spans: what the units replace.
        units: in the order of the spans.
    """

    def __init__(
        self, folder: Path, spans: Sequence[Span], dtype: torch.dtype = torch.float32, device: torch.device = CPU
    ) -> None:
        model = diffusers.QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
        self.teacher: nn.Module = model.to(device).eval().requires_grad_(False)
        self.blocks: list[nn.Module] = list(model.transformer_blocks)
        self.spans = list(spans)
        self.units = [deepcopy(self.blocks[first]).requires_grad_(True) for first, _ in self.spans]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for unit in self.units for parameter in unit.parameters()]

    @torch.no_grad()
    def read(self, batch: Latents) -> Reading:
        """One whole teacher forward with every block's arguments and output kept."""
        reading = Reading({}, {})
        hooks = []
        for number, block in enumerate(self.blocks):
            hooks.append(block.register_forward_hook(partial(_keep, reading, number), with_kwargs=True))
        self.forward(batch)
        for hook in hooks:
            hook.remove()
        return reading

    @torch.no_grad()
    def forward(self, batch: Latents, mask: Tensor | None = None) -> Tensor:
        """The teacher's velocity, packed, (B, H/2 * W/2, 4 C).

        Args:
            mask: (B, S) bool, which text tokens count; None, as the stock pipeline has it where no caption is padded.
        """
        count, _, height, width = shape = batch.noisy.shape
        return self.teacher(
            hidden_states=diffusers.QwenImagePipeline._pack_latents(batch.noisy, *shape),
            encoder_hidden_states=batch.embeds,
            encoder_hidden_states_mask=mask,
            timestep=batch.sigmas,
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]

    def loss(self, reading: Reading, place: int) -> Tensor:
        """The direction loss of unit number `place` at the end of its span, a scalar."""
        first, last = self.spans[place]
        students = self.units[place](**reading.arguments[first])
        pairs = zip(students, reading.outputs[last], strict=True)  # text, image
        losses = [boundary_loss(student, teacher, None, 0.0) for student, teacher in pairs]
        # Nobody reads the text that leaves the last block.
        return losses[1] if last == len(self.blocks) - 1 else losses[0] + losses[1]


def _keep(reading: Reading, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    assert not args  # this family calls its blocks by keyword
    reading.arguments[number], reading.outputs[number] = kwargs, output
