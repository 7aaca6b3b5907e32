"""What the units of a plan need of a teacher forward."""

from __future__ import annotations

from torch import Tensor

from ppcl_ds.teacher.anatomy import ATTENTION, Anatomy, Capture, Wanted
from ppcl_ds.units.plan import Plan, Stream, UnitPlan, modulated
from ppcl_ds.units.unit import Parcel


def wanted_by(plan: Plan, anatomy: Anatomy) -> Wanted:
    """The calls, exits and parts of blocks to record for a plan."""
    depth = [unit for unit in plan.units if unit.kind == "depth"]
    groups = [unit for unit in plan.units if unit.kind == "text"]
    narrowed = [(anatomy.blocks[unit.span[0]], unit.streams) for unit in plan.units if unit.kind == "ffn"]
    parts = {(block.index, block.ffn[stream]) for block, streams in narrowed for stream in streams}
    parts |= {(block, ATTENTION) for unit in groups for block in (unit.span[0], *unit.members)}
    exits = {unit.span[1] for unit in depth} | {block for unit in groups if unit.streams for block in unit.span}
    return Wanted(frozenset(unit.span[0] for unit in depth), frozenset(exits), frozenset(parts))


def parcels_of(capture: Capture, text_mask: Tensor | None, plan: Plan, anatomy: Anatomy) -> dict[str, Parcel]:
    """What every unit of the plan needs from one teacher forward (references to the recorded tensors)."""
    parcel = {"depth": _of_depth, "text": _of_text, "ffn": _of_ffn}
    return {unit.name: parcel[unit.kind](unit, capture, text_mask, anatomy) for unit in plan.units}


def _of_depth(unit: UnitPlan, capture: Capture, text_mask: Tensor | None, anatomy: Anatomy) -> Parcel:
    first, last = (anatomy.blocks[index] for index in unit.span)
    return Parcel(
        inputs=capture.streams[first.entering],
        conditioning=capture.conditioning[first.index],
        targets={stream: capture.streams[last.leaving][stream] for stream in unit.streams},
        text_mask=text_mask,
    )


def _of_text(unit: UnitPlan, capture: Capture, text_mask: Tensor | None, anatomy: Anatomy) -> Parcel:
    first, last = (anatomy.blocks[index] for index in unit.span)
    inputs = {"modulated": capture.parts[first.index, ATTENTION][0]}
    targets = {modulated(block): capture.parts[block, ATTENTION][0] for block in unit.members}
    for stream in unit.streams:
        inputs[stream] = capture.streams[first.leaving][stream]
        targets[stream] = capture.streams[last.leaving][stream]
    return Parcel(inputs=inputs, conditioning={}, targets=targets, text_mask=text_mask)


def _of_ffn(unit: UnitPlan, capture: Capture, text_mask: Tensor | None, anatomy: Anatomy) -> Parcel:
    block = anatomy.blocks[unit.span[0]]
    parts = {stream: capture.parts[block.index, block.ffn[stream]] for stream in unit.streams}
    return Parcel(
        inputs={stream: read for stream, (read, _) in parts.items()},
        conditioning={},
        targets={stream: returned for stream, (_, returned) in parts.items()},
        text_mask=text_mask,
    )


def boundaries_of(plan: Plan, variant: str) -> dict[int, tuple[int, tuple[Stream, ...]]]:
    """Where a variant can be compared with its teacher: behind each unit.

    Returns:
        Number of the variant's block -> the teacher's block whose leaving streams its own should be, and which streams.
    """
    origins = [origin for origin, _ in plan.places(variant)]
    found: dict[int, tuple[int, tuple[Stream, ...]]] = {}
    for unit in plan.units_of(variant):
        last = unit.span[1]
        place = max(number for number, origin in enumerate(origins) if origin <= last)
        streams = unit.streams
        if unit.kind != "depth":  # attention mixes the streams; nobody reads the text behind the last block
            streams = ("image", *(stream for stream in streams if stream == "text" and last < plan.blocks - 1))
        _, others = found.get(place, (last, ()))
        found[place] = last, tuple(dict.fromkeys((*others, *streams)))
    return found
