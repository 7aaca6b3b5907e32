"""The integer programme finds what trying every set finds, whatever two units do to each other."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_ds.planning.programme import Candidates, cheapest


def random_candidates(seed: int, count: int, blocks: int = 7) -> Candidates:
    random = np.random.default_rng(seed)
    starts = random.integers(0, blocks - 1, count)
    spans = [(u, int(random.integers(u + 1, blocks))) for u in starts.tolist()]
    pairs = np.triu(random.normal(size=(count, count)), 1)
    return Candidates(
        footprints=[frozenset(range(u, v + 1)) for u, v in spans],
        saved=np.array([v - u for u, v in spans], dtype=float),
        errors=random.random(count) * 10 ** random.uniform(-4, 0, count),
        pairs=(pairs + pairs.T) * random.choice([0.0, 0.01, 0.3]),
    )


def total(candidates: Candidates, chosen: tuple[int, ...]) -> float:
    alone = sum(candidates.errors[place] for place in chosen)
    return float(alone + sum(candidates.pairs[a, b] for a, b in combinations(chosen, 2)))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), goal=st.integers(1, 6))
def test_the_chosen_set_costs_least_of_all_that_fit(seed: int, count: int, goal: int) -> None:
    candidates = random_candidates(seed, count)
    feasible = [
        chosen
        for size in range(1, count + 1)
        for chosen in combinations(range(count), size)
        if abs(candidates.saved[list(chosen)].sum() - goal) <= 0.5
        and all(not candidates.footprints[a] & candidates.footprints[b] for a, b in combinations(chosen, 2))
    ]
    found = cheapest(candidates, goal - 0.5, goal + 0.5)
    if not feasible:
        assert found is None
        return
    assert found is not None
    assert tuple(found) in feasible
    best = min(total(candidates, chosen) for chosen in feasible)
    size = np.abs(candidates.errors).max() + np.abs(candidates.pairs).max()
    assert total(candidates, tuple(found)) == pytest.approx(best, abs=2e-4 * size)


def test_without_candidates_there_is_no_set() -> None:
    nothing = np.zeros(0)
    assert cheapest(Candidates([], nothing, nothing, np.zeros((0, 0))), 0, 1) is None
