"""What the rest of the house asks of the units of a plan, whatever their kinds."""

from __future__ import annotations

from functools import partial, reduce

import torch
from torch import Tensor

from ppcl_ds.teacher.anatomy import Anatomy, Capture, Wanted
from ppcl_ds.teacher.files import Source
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.units.spec import Stream
from ppcl_ds.units.unit import Unit, UnitBatch


def build_unit(plan: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
    """The unit as it is before training, on the CPU.

    Args:
        teacher: with weights.
        dtype: of its parameters.
    """
    return plan.behaviour.build(plan, teacher, dtype)


def empty_unit(plan: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
    """The same on the meta device; no weights are read."""
    return plan.behaviour.empty(plan, teacher, dtype)


def blank_unit(plan: UnitPlan, teacher: Teacher) -> dict[str, Source]:
    """A unit's tensors, all zeros, where others are going to take their place; float32, by their name in the unit."""
    tensors = empty_unit(plan, teacher, torch.float32).core.state_dict()
    return {
        name: Source(tensor.shape, torch.float32, partial(torch.zeros, tensor.shape))
        for name, tensor in tensors.items()
    }


def taps_of(plan: Plan, anatomy: Anatomy) -> Wanted:
    """What of a teacher forward the units of a plan read and are judged by."""
    return reduce(Wanted.union, (unit.behaviour.taps(unit, anatomy) for unit in plan.units))


def batches_of(capture: Capture, text_mask: Tensor | None, plan: Plan, anatomy: Anatomy) -> dict[str, UnitBatch]:
    """What every unit of the plan needs from one teacher forward (references to the recorded tensors)."""
    return {unit.name: unit.behaviour.batch(unit, capture, text_mask, anatomy) for unit in plan.units}


def parameters_saved(unit: UnitPlan, teacher: Teacher) -> int:
    """Parameters that a unit gives up, less its own."""
    return unit.behaviour.saves(unit, teacher)


def boundaries_of(plan: Plan, variant: str) -> dict[int, tuple[int, tuple[Stream, ...]]]:
    """Where a variant can be compared with its teacher: after each unit.

    Returns:
        Number of the variant's block -> the teacher's block whose leaving streams its own should be, and which streams.
    """
    origins = [origin for origin, _ in plan.places(variant)]
    found: dict[int, tuple[int, tuple[Stream, ...]]] = {}
    for unit in plan.units_of(variant):
        last = unit.span[1]
        place = max(number for number, origin in enumerate(origins) if origin <= last)
        _, others = found.get(place, (last, ()))
        found[place] = last, tuple(dict.fromkeys((*others, *unit.behaviour.boundary(unit, plan.blocks))))
    return found
