"""From a line of the plan to the unit itself."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from ppcl_ds.teacher.anatomy import Anatomy, Block, Streams
from ppcl_ds.teacher.modeling_pruned import ModulatedText, make_text_linear, narrow_ffn
from ppcl_ds.teacher.sources import Source
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.depth import DepthUnit, depth_unit
from ppcl_ds.units.plan import UnitPlan
from ppcl_ds.units.unit import Unit
from ppcl_ds.units.width import FFNUnit, TextUnit, hidden_channels


def build_unit(plan: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
    """The unit as it is before training, on the CPU.

    Args:
        teacher: with weights.
        dtype: number format of its parameters.
    """
    block = teacher.blocks[plan.span[0]]
    if plan.kind == "depth":
        return depth_unit(teacher, block.index, dtype)
    if plan.kind == "text":
        return TextUnit(plan.outputs, block.text_channels, dtype)
    return FFNUnit({s: teacher.filled(f"{block.key}.{block.ffn[s]}") for s in plan.streams}, plan.keep, dtype)


def narrow_block(module: Any, block: Block, unit: UnitPlan, streams: Streams) -> None:
    """Give a block by itself the parts that a width unit would give it, weights aside: it takes as long to run.

    Args:
        streams: that enter the block; the text among them stands for the modulated text of another block.
    """
    if unit.kind == "text":
        source = ModulatedText()
        source.text = streams["text"]
        make_text_linear(module, source, jump="text" in unit.streams and block.index == unit.span[1])
    for stream in unit.streams if unit.kind == "ffn" else ():
        part = module.get_submodule(block.ffn[stream])
        module.set_submodule(block.ffn[stream], narrow_ffn(part, hidden_channels(part, unit.keep)))


def rehearse_unit(plan: UnitPlan, model: nn.Module, anatomy: Anatomy, dtype: torch.dtype) -> Unit:
    """The same unit on the meta device, of a teacher on the meta device."""
    block = anatomy.blocks[plan.span[0]]
    module: Any = copy.deepcopy(anatomy.module(model, block))
    if plan.kind == "depth":
        return DepthUnit(block, module)
    if plan.kind == "text":
        return TextUnit(plan.outputs, block.text_channels, dtype).to("meta")
    return FFNUnit({s: module.get_submodule(block.ffn[s]) for s in plan.streams}, plan.keep, dtype)


def blank_unit(plan: UnitPlan, teacher: Teacher) -> dict[str, Source]:
    """A unit's tensors, all zeros, where others are going to take their place; float32, by their name in the unit."""
    tensors = rehearse_unit(plan, teacher.empty, teacher.anatomy, torch.float32).core.state_dict()
    return {
        name: Source(tensor.shape, torch.float32, partial(torch.zeros, tensor.shape))
        for name, tensor in tensors.items()
    }
