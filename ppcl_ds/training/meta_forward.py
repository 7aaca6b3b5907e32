"""One forward of the teacher on the meta device, which gives shapes and FLOPs but no numbers.

`config.json` is all that it needs, and a model of any size takes seconds and next to no memory.
Shapes: B batch, C latent channels, H and W latent height and width, S text tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ppcl_ds.data.batch import Prompts
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.anatomy import Capture, Tap
from ppcl_ds.teacher.call import caller_for
from ppcl_ds.teacher.files import ModelFiles
from ppcl_ds.teacher.teacher import Teacher


@dataclass(frozen=True)
class MetaForward:
    """What one forward of the teacher showed.

    Attributes:
        model: the teacher on the meta device, in the dtypes that it runs in.
        teacher: what it is a copy of.
        capture: every boundary, every block's arguments and what was wanted of its parts, meta tensors.
        text_mask: (B, S) bool.
        read: what it was called with: latents, prompts, noise levels; meta tensors.
        velocity: (B, C, H, W), meta.
        block_flops: FLOPs of each block's forward, all B samples.
        flops_until: FLOPs from the beginning of the forward until each block has ended, all B samples.
    """

    model: nn.Module
    teacher: Teacher
    capture: Capture
    text_mask: Tensor
    read: tuple[Tensor, ...]
    velocity: Tensor
    block_flops: tuple[int, ...]
    flops_until: tuple[int, ...]


def latent_channels(model: nn.Module) -> int:
    """C of the latents that a teacher reads; families that pack 2 x 2 patches count four times as many."""
    config: Any = model.config
    packed = caller_for(type(model).__name__).packed
    return int(config["in_channels"]) // (4 if packed else 1)


@torch.no_grad()
def meta_forward(
    teacher: Teacher,
    latents: tuple[int, int, int],
    text_tokens: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    taps: Iterable[Tap] = (),
) -> MetaForward:
    """Run the whole teacher once on meta tensors.

    Args:
        latents: (C, H, W) of a sample.
        text_tokens: S of its prompt; all of them count.
        batch: B.
        dtype: that the teacher runs in.
        taps: what is wanted of parts of blocks.

    Raises:
        UserError: the teacher cannot read samples of this shape.
    """
    caller = teacher.caller
    model = _on_meta(teacher.files, dtype)
    config: Any = model.config
    size, patch = "x".join(map(str, latents[1:])), 2 if caller.packed else config["patch_size"]
    if any(side % patch for side in latents[1:]):
        raise UserError(f"latents of {size}: {teacher.class_name} needs height and width in multiples of {patch}")
    prompts = Prompts(
        embeds=torch.empty(batch, text_tokens, config["joint_attention_dim"], device="meta", dtype=dtype),
        mask=torch.ones(batch, text_tokens, device="meta", dtype=torch.bool),
        pooled=torch.empty(batch, config.get("pooled_projection_dim", 0), device="meta", dtype=dtype),
    )
    noisy = torch.empty(batch, *latents, device="meta", dtype=dtype)
    sigmas = torch.ones(batch, device="meta")
    began: dict[int, int] = {}
    ended: dict[int, int] = {}
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        for block in teacher.blocks:
            module = teacher.anatomy.module(model, block)
            stack.callback(module.register_forward_pre_hook(partial(_note, counter, began, block.index)).remove)
            stack.callback(module.register_forward_hook(partial(_note, counter, ended, block.index)).remove)
        capture = stack.enter_context(teacher.anatomy.record(model))
        stack.enter_context(teacher.anatomy.tap(model, capture, taps))
        stack.enter_context(counter)
        try:
            velocity = caller(model, noisy, prompts, sigmas)
        except (ValueError, RuntimeError, IndexError) as fault:
            reason = str(fault).strip().splitlines()[0]
            raise UserError(f"{teacher.class_name} cannot read latents of {size}: {reason}") from None
    assert prompts.mask is not None
    assert prompts.pooled is not None
    order = range(len(teacher.blocks))
    return MetaForward(
        model,
        teacher,
        capture,
        prompts.mask,
        (noisy, prompts.embeds, prompts.mask, prompts.pooled, sigmas),
        velocity,
        block_flops=tuple(ended[index] - began[index] for index in order),
        flops_until=tuple(ended[index] for index in order),
    )


def _note(counter: FlopCounterMode, totals: dict[int, int], index: int, *_: Any) -> None:
    totals[index] = counter.get_total_flops()


def _on_meta(files: ModelFiles, dtype: torch.dtype) -> nn.Module:
    model = files.empty_model()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(files.runs_as(name, dtype))
    return model.to("meta")
