"""What the units of a plan need of a teacher forward."""

from __future__ import annotations

from torch import Tensor

from ppcl_ds.families.anatomy import Anatomy, Capture, Wanted
from ppcl_ds.planning.plan import Plan
from ppcl_ds.units.depth import Parcel


def wanted_by(plan: Plan) -> Wanted:
    """The calls and exits to record for a plan."""
    return Wanted(frozenset(unit.span[0] for unit in plan.units), frozenset(unit.span[1] for unit in plan.units))


def parcels_of(capture: Capture, text_mask: Tensor | None, plan: Plan, anatomy: Anatomy) -> dict[str, Parcel]:
    """What every unit of the plan needs from one teacher forward (references to the recorded tensors)."""
    parcels = {}
    for unit in plan.units:
        first, last = (anatomy.blocks[index] for index in unit.span)
        parcels[unit.name] = Parcel(
            inputs=capture.streams[first.entering],
            conditioning=capture.conditioning[first.index],
            targets={stream: capture.streams[last.leaving][stream] for stream in unit.streams},
            text_mask=text_mask,
        )
    return parcels
