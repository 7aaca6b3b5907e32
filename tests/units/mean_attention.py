"""A fourth kind of unit: the attention of a FLUX single block becomes a linear of the mean over its heads.

It is all that a new kind takes. `python -m tests.units.mean_attention distill RECIPE` is `ppcl` with it.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_ds.cli import main
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.anatomy import Anatomy, Block, Capture, Streams, Tap, Wanted
from ppcl_ds.teacher.files import Sources
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plugging import replace_forward
from ppcl_ds.units.spec import Export, Kind, Part, UnitPlan, register
from ppcl_ds.units.unit import Unit, UnitBatch, WidthUnit, count_parameters

HEADS = 2


class MeanOverHeads(nn.Linear):
    """(B, S, heads x D) -> (B, S, heads x D), from the mean over heads."""

    def __init__(self, channels: int, dtype: torch.dtype, device: str = "cpu") -> None:
        super().__init__(channels // HEADS, channels, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(-1, (HEADS, -1)).mean(-2))


class MeanAttentionUnit(WidthUnit):
    """The attention's output from its input."""

    def forward(self, inputs: Streams, conditioning: dict[str, Any]) -> Streams:
        return {"image": self.compute("image", inputs["image"])}


def read_and_returned(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> tuple[Tensor, Tensor]:
    return kwargs["hidden_states"], output


class MeanAttentionKind(Kind):
    name = "mean-attention"

    def footprint(self, unit: UnitPlan) -> frozenset[Part]:
        return frozenset([(unit.span[0], "rest")])

    def problem(self, unit: UnitPlan, teacher: Teacher) -> str:
        single = teacher.blocks[unit.span[0]].list_name == "single_transformer_blocks"
        return "" if single else "mean-attention is for single blocks"

    def _tap(self, unit: UnitPlan) -> Tap:
        return Tap(unit.span[0], "attn", read_and_returned)

    def taps(self, unit: UnitPlan, anatomy: Anatomy) -> Wanted:
        return Wanted(frozenset(), frozenset(), frozenset([self._tap(unit)]))

    def batch(self, unit: UnitPlan, capture: Capture, text_mask: Tensor | None, anatomy: Anatomy) -> UnitBatch:
        read, returned = capture.parts[self._tap(unit)]
        return UnitBatch(inputs={"image": read}, conditioning={}, targets={"image": returned}, text_mask=None)

    def _channels(self, unit: UnitPlan, teacher: Teacher) -> int:
        return teacher.module(teacher.blocks[unit.span[0]]).get_submodule("attn").to_q.in_features  # type: ignore[union-attr, return-value]

    def build(self, unit: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(unit.span[0])
            return MeanAttentionUnit({"image": MeanOverHeads(self._channels(unit, teacher), dtype)})

    def empty(self, unit: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
        return MeanAttentionUnit({"image": MeanOverHeads(self._channels(unit, teacher), dtype, "meta")})

    def plug(self, unit: UnitPlan, own: Any, model: nn.Module, anatomy: Anatomy, stack: ExitStack) -> None:
        part = anatomy.module(model, anatomy.blocks[unit.span[0]]).get_submodule("attn")
        replace_forward(part, partial(_run, own), stack)

    def saves(self, unit: UnitPlan, teacher: Teacher) -> int:
        attention = teacher.module(teacher.blocks[unit.span[0]]).get_submodule("attn")
        return count_parameters(attention) - count_parameters(self.empty(unit, teacher, torch.float32))

    def export(self, unit: UnitPlan, own: Sources, anatomy: Anatomy, model: Export) -> None:
        raise UserError(f"unit '{unit.name}': modeling_pruned.py, which travels with a model, has no {self.name} yet")

    def shrink(self, unit: UnitPlan, module: Any, block: Block, streams: Streams) -> None:
        module.attn = MeanOverHeads(module.attn.to_q.in_features, module.attn.to_q.weight.dtype)

    def label(self, unit: UnitPlan) -> str:
        return f"mean attention[{unit.span[0]}]"

    def facts(self, unit: UnitPlan) -> tuple[str, str]:
        return f"the attention of block {unit.span[0]}", "a linear of the mean over heads"


def _run(own: Any, hidden_states: Tensor, **others: Any) -> Tensor:
    return own.compute("image", hidden_states)


register(MeanAttentionKind())

if __name__ == "__main__":
    main()
