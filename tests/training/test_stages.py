"""Stages get neighbours of about equal cost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppcl_ds.errors import UserError
from ppcl_ds.training.stages import stage_bounds


@given(st.lists(st.tuples(st.integers(1, 1000), st.booleans()), min_size=1, max_size=12), st.data())
def test_no_stage_is_idle_and_what_is_joined_stays_together(
    layers: list[tuple[int, bool]], data: st.DataObject
) -> None:
    costs, joined = [cost for cost, _ in layers], [False, *(stays for _, stays in layers[1:])]
    stages = data.draw(st.integers(1, joined.count(False)))
    bounds = stage_bounds(joined, costs, stages)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(layers), stages + 1)
    assert all(first < stop for first, stop in pairwise(bounds))
    assert not any(joined[start] for start in bounds[:-1])


def test_layers_are_spread_by_their_cost() -> None:
    assert stage_bounds([False] * 4, [3, 1, 1, 1], 2) == [0, 1, 4]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"topology\.stages is 3, but the plan's 2 units can be cut into 2 stages"):
        stage_bounds([False] * 2, [1, 1], 3, "the plan's {} units")
