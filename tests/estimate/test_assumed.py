"""Where there is no plan yet, the spans that stand in for it are possible ones and give up the share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from ppcl_ds.estimate.assumed import assume_plan
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import load_plan
from tests.conftest import TEACHERS

Configured = Callable[..., Teacher]


@pytest.mark.parametrize("family", TEACHERS)
@pytest.mark.parametrize("share", [0.01, 0.25, 0.34, 0.5, 0.66])
def test_an_assumed_plan_is_a_possible_one(configured: Configured, family: str, share: float) -> None:
    teacher = configured(family)
    plan = assume_plan({"small": share, "smaller": share / 2}, teacher)
    path = teacher.files.folder / "plan.yaml"
    plan.save(path)
    assert load_plan(path, teacher) == plan
    assert list(plan.variants) == ["small"]
    assert {unit.span for unit in plan.units} <= teacher.allowed_spans


@pytest.mark.parametrize(("share", "units", "length"), [(0.25, 15, 2), (0.5, 30, 2), (0.75, 15, 4)])
def test_units_are_as_many_as_the_share_may_need(configured: Configured, share: float, units: int, length: int) -> None:
    teacher = configured("qwen", num_layers=60)
    anatomy = teacher.anatomy
    plan = assume_plan({"it": share}, teacher)
    assert len(plan.units) == units
    assert {v - u + 1 for u, v in (unit.span for unit in plan.units)} == {length}
    gone = sum(
        block.parameters for u, v in (unit.span for unit in plan.units) for block in anatomy.blocks[u + 1 : v + 1]
    )
    assert gone / anatomy.block_parameters == pytest.approx(share)
    starts = [unit.span[0] for unit in plan.units]
    assert {b - a for a, b in pairwise(starts)} == {60 // units}


def test_the_last_blocks_text_is_not_a_target(configured: Configured) -> None:
    teacher = configured("qwen")
    plan = assume_plan({"it": 0.5}, teacher)
    assert plan.units[-1].span == (4, 5)
    assert plan.units[-1].streams == ("image",)
    assert plan.units[0].streams == ("image", "text")
