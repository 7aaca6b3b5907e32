"""Every rule gives up the share it was asked for, in spans that units can take the place of; each in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_ds.planning.budget import Budget
from ppcl_ds.planning.rules import RuleInputs, Span, spans_by
from ppcl_ds.probing.report import MEAN, Figure, Matrix, ProbeReport
from ppcl_ds.sections import Rule

RULES: list[Rule] = ["error", "ppcl", "influence", "uniform", "random"]
LISTS = {"one list": [range(12)], "two lists": [range(5), range(5, 14)]}


def ground_of(
    lists: Sequence[Sequence[int]],
    seed: int = 0,
    *,
    spans: Sequence[Span] = (),
    influence: Sequence[float] | None = None,
    closing: bool = True,
) -> RuleInputs:
    """A teacher that nobody needs to build: what a probe says of it is drawn at random.

    Args:
        closing: whether spans may close the last list.
    """
    count = lists[-1][-1] + 1
    random = np.random.default_rng(seed)
    error: Matrix = [[None] * count for _ in range(count)]
    allowed = {(u, v) for blocks in lists for u, v in product(blocks, blocks) if u < v and (closing or v < count - 1)}
    for u, v in allowed:
        error[u][v] = float(random.random() ** 3)
    row: list[float | None] = list(influence if influence is not None else random.random(count))
    report = ProbeReport(
        teacher="",
        tokens={},
        cka=error,
        error=error,
        spans=list(spans),
        unused=[],
        figures={MEAN: {"influence": Figure(value=[row], spread=[row])}},
    )
    sizes = np.concatenate([np.full(len(blocks), 3.0 - place) for place, blocks in enumerate(lists)])
    return RuleInputs(
        report, Budget("parameters", sizes, {}), lists, allowed, max_span=6, seed=seed, given=[(0, 1), (2, 4), (6, 8)]
    )


@settings(deadline=None, max_examples=60)
@given(
    rule=st.sampled_from([rule for rule in RULES if rule != "ppcl"]),
    kind=st.sampled_from(sorted(LISTS)),
    seed=st.integers(0, 10**6),
    share=st.floats(0.1, 0.7),
    closing=st.booleans(),
)
def test_a_rule_gives_up_the_share_in_spans_that_fit(
    rule: Rule, kind: str, seed: int, share: float, closing: bool
) -> None:
    inputs = ground_of(LISTS[kind], seed, closing=closing)
    spans = spans_by(rule, inputs, share)
    assert spans is not None
    assert set(spans) <= inputs.allowed
    assert all(a[1] < b[0] for a, b in pairwise(sorted(spans)))
    lists = len(inputs.lists) if rule == "uniform" else 1  # each list meets the share by itself
    assert inputs.saved(spans) == pytest.approx(share * inputs.budget.total, abs=lists * inputs.budget.slack)


def test_influence_removes_the_blocks_that_change_least() -> None:
    influence = [0.0, 0.9, 0.1, 0.2, 0.8, 0.05, 0.7, 0.6, 0.15, 0.5, 0.4, 0.3]  # nothing comes before block 0
    inputs = ground_of(LISTS["one list"], influence=influence)
    assert spans_by("influence", inputs, 4 / 12) == [(1, 3), (4, 5), (7, 8)]
    assert spans_by("influence", inputs, 5 / 12) == [(1, 3), (4, 5), (7, 8), (10, 11)]


def test_uniform_spreads_the_blocks_that_stay() -> None:
    inputs = ground_of(LISTS["one list"])
    assert spans_by("uniform", inputs, 0.5) == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    assert spans_by("uniform", inputs, 0.75) == [(0, 3), (4, 7), (8, 11)]
    for share in (0.2, 1 / 3, 0.6):
        spans = spans_by("uniform", inputs, share) or []
        groups = [1 + v - u for u, v in spans] + [1] * (12 - sum(1 + v - u for u, v in spans))
        assert max(groups) - min(groups) <= 1
    assert spans_by("uniform", ground_of([range(6)], closing=False), 0.5) == [(0, 1), (2, 4)]


def test_random_depends_on_the_seed_alone() -> None:
    drawn = [tuple(spans_by("random", ground_of(LISTS["one list"], seed), 0.5) or ()) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_the_papers_spans_join_only_where_they_do_not_suffice() -> None:
    spans = [(0, 1), (2, 4), (6, 8), (9, 11)]
    inputs = ground_of(LISTS["one list"], spans=spans)
    assert set(spans_by("ppcl", inputs, 0.5) or ()) <= set(spans)  # 7 blocks can go
    assert spans_by("ppcl", inputs, 0.75) == [(0, 4), (6, 11)]  # 9 blocks: both neighbours at once, block 5 stays
    assert spans_by("ppcl", inputs, 0.9) is None


def test_given_takes_the_spans_it_was_given() -> None:
    inputs = ground_of(LISTS["one list"])
    assert spans_by("given", inputs, 5 / 12) == [(0, 1), (2, 4), (6, 8)]
    assert spans_by("given", inputs, 0.8) is None
