"""The integer programme finds what trying every set finds, whatever two units do to each other."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_ds.planning.programme import Candidates, cheapest, least_product


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


def sets_that_fit(candidates: Candidates, goal: int) -> list[tuple[int, ...]]:
    """Every set of units that do not conflict and give up about as much as is wanted."""
    return [
        chosen
        for size in range(1, len(candidates.errors) + 1)
        for chosen in combinations(range(len(candidates.errors)), size)
        if abs(candidates.saved[list(chosen)].sum() - goal) <= 0.5
        and all(not candidates.footprints[a] & candidates.footprints[b] for a, b in combinations(chosen, 2))
    ]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), goal=st.integers(1, 6))
def test_the_chosen_set_costs_least_of_all_that_fit(seed: int, count: int, goal: int) -> None:
    candidates = random_candidates(seed, count)
    feasible = sets_that_fit(candidates, goal)
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


def two_measures(seed: int, count: int) -> list[Candidates]:
    """One library by two measures that rank its units differently; errors of sets are positive, as they are squares."""
    library = random_candidates(seed, count, blocks=9)
    random = np.random.default_rng(seed + 1)
    measures = []
    for scale in (1.0, 1e-3):
        added = random.normal(size=(count, 6)) * 10 ** random.uniform(-1.5, 0, count)[:, None]
        products = scale * added @ added.T
        alone = products.diagonal().copy()
        measures.append(replace(library, errors=alone, pairs=2 * (products - np.diag(alone))))
    return measures


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 10), goal=st.integers(1, 8))
def test_the_product_of_two_errors_is_the_least_of_all_sets(seed: int, count: int, goal: int) -> None:
    """Against every set of the library; the solver's own tolerance on either error is one in ten thousand."""
    measures = two_measures(seed, count)
    feasible = sets_that_fit(measures[0], goal)
    found = least_product(measures, goal - 0.5, goal + 0.5)
    if not feasible:
        assert found is None
        return
    assert found is not None
    assert tuple(found) in feasible

    def product(chosen: tuple[int, ...]) -> float:
        return total(measures[0], chosen) * total(measures[1], chosen)

    assert product(tuple(found)) <= min(map(product, feasible)) * 1.002


def test_neither_end_has_to_be_the_best() -> None:
    """Three units, one of which may go: the least of either error is dear by the other, the third is good at both."""
    footprints = [frozenset({0})] * 3
    v, d = np.array([1.0, 10.0, 2.0]), np.array([10.0, 1.0, 2.0])
    measures = [Candidates(footprints, np.ones(3), errors, np.zeros((3, 3))) for errors in (v, d)]
    assert least_product(measures, 0.5, 1.5) == [2]
    assert least_product(measures[:1], 0.5, 1.5) == [0]
    hidden = [replace(each, errors=np.array([*each.errors[:2], 6.0])) for each in measures]  # above the line of both
    assert least_product(hidden, 0.5, 1.5) in ([0], [1])


def test_a_search_ends_in_time_with_a_set_that_fits() -> None:
    """Of a size at which no optimum is proven within a minute; held against the constraints."""
    random, count = np.random.default_rng(0), 76
    footprints = [frozenset({unit // 2, unit // 2 + 1}) for unit in range(count)]
    measures = []
    for _ in range(2):
        added = random.normal(size=(count, 400)) + 0.4 * random.normal(size=400)
        products = added @ added.T / 400
        measures.append(
            Candidates(footprints, np.ones(count), products.diagonal(), 2 * (products - np.diag(products.diagonal())))
        )
    began = time.monotonic()
    found = least_product(measures, 9.5, 10.5, seconds=2.0)
    assert time.monotonic() - began < 20, "as busy as the machine may be"
    assert found is not None
    assert len(found) == 10
    assert sum(len(footprints[unit]) for unit in found) == len(frozenset.union(*(footprints[unit] for unit in found)))
