"""Units of a checkpoint by the names of a plan."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ppcl_ds.distill.checkpoint import Checkpoint
from ppcl_ds.errors import UserError
from ppcl_ds.families.sources import Source
from ppcl_ds.planning.plan import Plan, UnitPlan


def unit_state(checkpoint: Checkpoint, trained: Plan, unit: UnitPlan) -> dict[str, Tensor]:
    """A trained unit's float32 masters, by their name inside the unit.

    Args:
        trained: the plan that the checkpoint was trained with.

    Raises:
        UserError: the unit was not trained in that run, or its file cannot be read.
    """
    _check_trained(checkpoint, trained, unit)
    return checkpoint.unit(unit.name)


def unit_sources(checkpoint: Checkpoint, trained: Plan, unit: UnitPlan) -> dict[str, Source]:
    """The same, each tensor read when it is asked for.

    Raises:
        UserError: the unit was not trained in that run.
    """
    _check_trained(checkpoint, trained, unit)
    sources: dict[str, Source] = {}
    start = 0
    for name, dimensions in checkpoint.contents.units[unit.name].parameters.items():
        shape = torch.Size(dimensions)
        sources[name] = Source(shape, torch.float32, partial(_read, checkpoint, unit.name, start, shape))
        start += shape.numel()
    return sources


def _check_trained(checkpoint: Checkpoint, trained: Plan, unit: UnitPlan) -> None:
    if unit not in trained.units or unit.name not in checkpoint.contents.units:
        where = checkpoint.folder.parent.parent
        raise UserError(f"unit '{unit.name}' on blocks {list(unit.span)} was not trained in {where}")


def _read(checkpoint: Checkpoint, unit: str, start: int, shape: torch.Size) -> Tensor:
    return checkpoint.part(unit, "master", start, start + shape.numel()).view(shape)
