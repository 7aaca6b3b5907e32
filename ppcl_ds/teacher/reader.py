"""The teacher at work: numbered micro-batches of the data go in, what crossed its boundaries comes out.

Probing and distillation read the teacher through this one door, so that both see the same samples and noise.
Shapes: B batch, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ppcl_ds.data.batch import Batch, Prompts
from ppcl_ds.data.noising import add_noise, draw_sigmas
from ppcl_ds.data.stream import MicroBatchStream, empty_prompt
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import CaptionEncoding, Noise
from ppcl_ds.teacher.anatomy import Anatomy, Block, Capture, Wanted
from ppcl_ds.teacher.call import Caller, caller_for
from ppcl_ds.teacher.files import ModelFiles

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_teacher(recipe: Recipe) -> tuple[ModelFiles, Anatomy]:
    """The recipe's teacher, looked at but not loaded.

    Raises:
        UserError: it is not there, not a diffusers transformer, or of a family that cannot be called yet.
    """
    files = ModelFiles(recipe.teacher.path)
    caller_for(files.class_name)
    model: Any = files.empty_model()
    missing = sorted(name for name, _ in model.named_parameters() if name not in files.keys)
    if missing:
        raise UserError(f"teacher {files.folder}: tensor '{missing[0]}' is missing from the safetensors files")
    check_captions(recipe.data.captions, model)
    return files, Anatomy(model)


def check_captions(captions: CaptionEncoding, model: Any) -> None:
    """Refuse captions that are encoded for another model.

    Args:
        model: the teacher or a variant, empty or not.

    Raises:
        UserError: their embeddings are not as wide as those that the model reads.
    """
    for key, own in (("joint_attention_dim", captions.width), ("pooled_projection_dim", captions.pooled_width)):
        wide = model.config.get(key, own)  # the model's: a file may have keys that its class does not know
        if wide != own:
            raise UserError(f"data.captions gives embeddings {own} channels wide, but the teacher's {key} is {wide}")


@dataclass(frozen=True)
class NoisyBatch:
    """A micro-batch as the teacher reads it.

    Attributes:
        latents: (B, C, H, W), noisy.
        prompts: B captions, some of them replaced by the empty one.
        sigmas: (B,) float32 noise levels in (0, 1]; families round them themselves, if at all.
        velocity: (B, C, H, W) float32, `noise - data`: what flow matching asks for.
    """

    latents: Tensor
    prompts: Prompts
    sigmas: Tensor
    velocity: Tensor


class NoisyStream:
    """Endless numbered micro-batches with noise; number j is the same whoever reads it.

    Everything random about micro-batch j (noise, noise levels, dropped captions) is drawn from a generator seeded by
    (seed, j), so neither the number of ranks nor a restart changes it, and no random state needs saving.

    Args:
        split: `train` in shuffled order, `heldout` in stored order.
        micro_batch: samples in a micro-batch.
        lanes: micro-batches in an optimizer step; the recipe's distillation by default.
    """

    def __init__(
        self,
        recipe: Recipe,
        split: Literal["train", "heldout"],
        micro_batch: int,
        device: torch.device,
        lanes: int | None = None,
    ) -> None:
        self.noise: Noise = recipe.noise
        self.seed, self.device, self.dtype = recipe.seed, device, DTYPES[recipe.teacher.precision]
        self.empty = empty_prompt(recipe.data)
        self.clean = MicroBatchStream(
            recipe.data,
            split,
            micro_batch,
            recipe.seed,
            recipe.bad_samples,
            lanes=lanes or recipe.distill.micro_batches_per_step,
        )

    def take(self, start: int, stride: int) -> Iterator[tuple[int, NoisyBatch]]:
        """Micro-batches start, start + stride, ... with their numbers, on the device."""
        for number, batch in self.clean.take(start, stride):
            yield number, self._with_noise(number, batch)

    def _with_noise(self, number: int, batch: Batch) -> NoisyBatch:
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        batch = batch.drop_captions(self.empty, self.noise.caption_dropout, generator)
        sigmas = draw_sigmas(self.noise, len(batch.keys), generator)
        noisy, velocity = add_noise(batch.latents, sigmas, generator)
        return NoisyBatch(
            noisy.to(self.device, self.dtype),
            batch.prompts.to(self.device, self.dtype),
            sigmas.to(self.device),
            velocity.to(self.device, torch.float32),
        )


@torch.no_grad()
def read_teacher(
    model: nn.Module, anatomy: Anatomy, caller: Caller, batch: NoisyBatch, wanted: Wanted | None = None
) -> Capture:
    """One forward of the teacher with its boundaries recorded.

    Args:
        model: the transformer or a ZeRO-3 engine around it; then every rank must call this together.
        wanted: what is recorded, and so where the forward may end; everything by default.
    """
    with anatomy.record(getattr(model, "module", model), wanted) as capture:
        caller.run(model, batch.latents, batch.prompts, batch.sigmas)
    return capture


@torch.no_grad()
def unread_streams(model: nn.Module, anatomy: Anatomy, caller: Caller, batch: NoisyBatch) -> list[str]:
    """Streams that leave the last block and are read by nobody.

    Found by poisoning: if the velocity stays finite when a stream is all NaN, the teacher does not look at it. Units at
    the end must not be trained on such a stream: its values mean nothing. Collective like `read_teacher`.
    """
    block = anatomy.blocks[-1]
    unread = []
    for stream in block.returns:
        if stream == "image":
            continue
        handle = anatomy.module(getattr(model, "module", model), block).register_forward_hook(_poison(block, stream))
        velocity = caller(model, batch.latents, batch.prompts, batch.sigmas)
        handle.remove()
        if bool(velocity.isfinite().all()):
            unread.append(stream)
    return unread


def _poison(block: Block, stream: str) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        streams = block.read_output(output)
        return block.write_output({s: t * torch.nan if s == stream else t for s, t in streams.items()})

    return hook
