"""One forward of the teacher on the meta device, which gives shapes and FLOPs but no numbers.

Configurations are all that it needs, and a model of any size takes seconds and next to no memory.
Shapes: B batch, S text tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ppcl_ds.data.batch import Size
from ppcl_ds.errors import UserError, brief
from ppcl_ds.teacher.anatomy import Capture, Tap
from ppcl_ds.teacher.pipeline_call import Arguments
from ppcl_ds.teacher.teacher import Teacher, forward, text_mask
from ppcl_ds.teacher.weightless import Remembering, WithoutWeights


@dataclass(frozen=True)
class MetaForward:
    """What one forward of the teacher showed.

    Attributes:
        model: the teacher on the meta device, in the dtypes that it runs in.
        teacher: what it is a copy of.
        capture: every boundary, every block's arguments and what was wanted of its parts, meta tensors.
        text_mask: (B, S) bool, or None where all tokens count.
        read: what it was called with; meta tensors.
        output: what it put out, meta.
        block_flops: FLOPs of each block's forward, all B samples.
        flops_until: FLOPs from the beginning of the forward until each block has ended, all B samples.
    """

    model: nn.Module
    teacher: Teacher
    capture: Capture
    text_mask: Tensor | None
    read: tuple[Tensor, ...]
    output: Tensor
    block_flops: tuple[int, ...]
    flops_until: tuple[int, ...]


@torch.no_grad()
def meta_forward(teacher: Teacher, size: Size, batch: int = 1, taps: Iterable[Tap] = ()) -> MetaForward:
    """Run the whole teacher once on meta tensors.

    Args:
        size: of a sample; captions are as long as captions usually are.
        batch: B.
        taps: what is wanted of parts of blocks.

    Raises:
        UserError: the teacher cannot read samples of this size.
    """
    arguments = teacher.example(size, batch)
    model = _on_meta(teacher)
    on_meta = _tree_on_meta(arguments)
    try:
        try:
            capture, output, began, ended = _run(teacher, model, on_meta, taps, Remembering())
        except RuntimeError:  # it looks at values of what it is given, lengths of captions for example
            capture, output, began, ended = _run(teacher, model, arguments, taps, WithoutWeights())
            for number, conditioning in capture.conditioning.items():
                capture.conditioning[number] = _tree_on_meta(conditioning)
    except (ValueError, RuntimeError, IndexError) as fault:
        pixels = f"{size.height} x {size.width} pixels"
        raise UserError(f"{teacher.class_name} cannot read samples of {pixels}: {brief(fault)}") from None
    order = range(len(teacher.blocks))
    return MetaForward(
        model,
        teacher,
        capture,
        text_mask(arguments, capture),
        tuple(leaf for leaf in pytree.tree_leaves(on_meta) if isinstance(leaf, Tensor)),
        output,
        block_flops=tuple(ended[index] - began[index] for index in order),
        flops_until=tuple(ended[index] for index in order),
    )


def _tree_on_meta(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to("meta"), tree)


def _run(
    teacher: Teacher, model: nn.Module, arguments: Arguments, taps: Iterable[Tap], inside: Any
) -> tuple[Capture, Tensor, dict[int, int], dict[int, int]]:
    """What is recorded, the output, and FLOPs before and after each block."""
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
        stack.enter_context(inside)
        stack.enter_context(counter)
        return capture, forward(model, arguments), began, ended


def _note(counter: FlopCounterMode, totals: dict[int, int], index: int, *_: Any) -> None:
    totals[index] = counter.get_total_flops()


def _on_meta(teacher: Teacher) -> nn.Module:
    model = teacher.files.empty_model()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(teacher.files.runs_as(name, teacher.dtype))
    return model.to("meta")
