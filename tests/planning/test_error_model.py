"""What is forecast of sets of units: exact where errors overlap linearly, fitted where they bend."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from ppcl_ds.planning.error_model import fitted, fitted_model
from ppcl_ds.planning.swaps import MeasuredSet, Swaps, draw_sets
from ppcl_ds.units.plan import Plan, UnitPlan

SPANS = [(0, 1), (2, 3), (4, 6), (5, 6), (7, 8), (9, 11)]
UNITS = tuple(UnitPlan(name=f"unit {u}", span=(u, v), streams=("image",)) for u, v in SPANS)
LIBRARY = Plan(teacher="teacher", blocks=12, units=UNITS, variants={})


def added_velocities(seed: int = 0) -> np.ndarray:
    """(K, N): what each unit adds to the velocity; they have a part in common."""
    random = np.random.default_rng(seed)
    return (random.normal(size=(len(UNITS), 500)) + 0.6 * random.normal(size=500)) * np.linspace(0.1, 0.4, 6)[:, None]


def swaps_of(added: np.ndarray, bend: np.ndarray) -> Swaps:
    """A library whose sets cost the square of the sum of what their units add, and `bend` of every two of them."""
    products = added @ added.T / added.shape[1]
    roots = np.sqrt(np.outer(products.diagonal(), products.diagonal()))
    sets = []
    for names in draw_sets(LIBRARY, seed=0):
        chosen = [unit.name in names for unit in UNITS]
        pairs = np.triu((bend[:, None] + bend[None]) * roots, 1)[np.ix_(chosen, chosen)].sum()
        error = float(np.square(added[chosen].sum(0)).mean() + pairs)
        sets.append(MeasuredSet(units=names, errors={"velocity": error}))
    return Swaps(checkpoint="", units=UNITS, products={"velocity": products.tolist()}, sets=sets, seconds=[])


def test_a_unit_alone_costs_what_was_measured() -> None:
    added = added_velocities()
    forecast = fitted_model(swaps_of(added, np.zeros(6)), "velocity")
    for unit, own in zip(UNITS, added, strict=True):
        assert forecast.of([unit]) == pytest.approx(np.square(own).mean())


@pytest.mark.parametrize("bend", [np.zeros(6), np.array([0.1, 0.0, 0.3, 0.05, -0.1, 0.2])])
def test_sets_that_were_not_measured_are_foretold(bend: np.ndarray) -> None:
    added = added_velocities()
    swaps = swaps_of(added, bend)
    fewer = swaps.model_copy(update={"sets": swaps.sets[::2]})
    forecast = fitted_model(fewer, "velocity")
    for each in swaps.sets[1::2]:
        expected = forecast.of([unit for unit in UNITS if unit.name in each.units])
        assert expected == pytest.approx(each.errors["velocity"], rel=0.03)


def test_without_measured_sets_errors_overlap_linearly() -> None:
    added = added_velocities()
    swaps = swaps_of(added, np.zeros(6))
    forecast = fitted_model(swaps.model_copy(update={"sets": []}), "velocity")
    for each in swaps.sets:
        assert forecast.of([unit for unit in UNITS if unit.name in each.units]) == pytest.approx(
            each.errors["velocity"]
        )


def test_an_unknown_unit_has_no_forecast() -> None:
    forecast = fitted_model(swaps_of(added_velocities(), np.zeros(6)), "velocity")
    assert forecast.of([UnitPlan(name="another", span=(1, 2), streams=("image",))]) is None


def test_drawn_sets_fit_together_and_differ() -> None:
    sets = draw_sets(LIBRARY, seed=3, count=20)
    assert len(set(sets)) == len(sets) > 10
    assert {len(names) for names in sets} == {2, 3, 4, 5}
    for names in sets:
        spans = [unit.span for unit in UNITS if unit.name in names]
        assert all(a[1] < b[0] for a, b in pairwise(spans))
    assert sets == draw_sets(LIBRARY, seed=3, count=20) != draw_sets(LIBRARY, seed=4, count=20)


def test_a_set_that_is_not_finite_says_nothing_and_is_written_as_it_is() -> None:
    swaps = swaps_of(added_velocities(), np.zeros(6))
    known = fitted_model(swaps, "velocity")
    swaps.sets.append(MeasuredSet(units=tuple(unit.name for unit in UNITS[:2]), errors={"velocity": float("inf")}))
    assert np.array_equal(fitted_model(swaps, "velocity").pairs, known.pairs)
    assert fitted(swaps, "velocity").value({"velocity": float("nan")}) == float("inf"), "it is never the least"
    assert Swaps.model_validate(json.loads(swaps.model_dump_json())) == swaps
