"""A stand-in for the plan of a run that has not been probed yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set

from ppcl_ds.teacher.anatomy import Anatomy, Block
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import Plan, UnitPlan


def assume_plan(shares: dict[str, float], teacher: Teacher) -> Plan:
    """Spans of equal length, spread evenly over every block list, that give up the largest share asked for.

    They are the shortest spans that can give it up: so many units as a variant may need, hence rather too much memory
    and work than too little. A library shared by several variants may still hold more.

    Args:
        shares: variant -> share of the block parameters that it gives up (`plan.variants`).
    """
    variant, share = max(shares.items(), key=lambda item: item[1])
    lists: dict[str, list[Block]] = {}
    for block in teacher.blocks:
        lists.setdefault(block.list_name, []).append(block)
    allowed = teacher.allowed_spans
    spans = sorted(span for blocks in lists.values() for span in _spans(blocks, share, allowed))
    if not spans:  # a share of less than half a block: one span, as the planner would choose
        spans = [min(allowed)]
    units = tuple(
        UnitPlan(name=f"blocks_{u:02d}_{v:02d}", span=(u, v), streams=_streams(teacher.anatomy, v)) for u, v in spans
    )
    names = tuple(unit.name for unit in units)
    return Plan(teacher=teacher.class_name, blocks=len(teacher.blocks), units=units, variants={variant: names})


def _spans(blocks: list[Block], share: float, allowed: Set[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    first, count = blocks[0].index, len(blocks)
    length = max(2, math.ceil(1 / (1 - share) - 1e-9))  # the shortest with (length - 1) / length >= share
    last = first + count - 1
    usable = count if (last - length + 1, last) in allowed else count - 1
    number = min(round(share * count / (length - 1)), usable // length)
    for place in range(number):
        start = first + place * usable // number
        yield start, start + length - 1


def _streams(anatomy: Anatomy, last: int) -> tuple:
    """Streams that a span's end is judged by; of the teacher's last block only the image is read by anyone."""
    returned = anatomy.blocks[last].returns
    return tuple(stream for stream in returned if stream == "image" or last < len(anatomy) - 1)
