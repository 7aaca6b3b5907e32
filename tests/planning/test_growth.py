"""What more training is worth: exponents against curves that are known, chosen units and steps against every choice."""

from __future__ import annotations

from itertools import combinations, pairwise, product
from math import log

import numpy as np
import pytest

from ppcl_ds.planning.budget import Budget
from ppcl_ds.planning.choose import Chooser, choose_sets
from ppcl_ds.planning.error_model import fitted
from ppcl_ds.planning.growth import exponents, factors, steps_each
from ppcl_ds.planning.swaps import Swaps
from ppcl_ds.sections import Plan as PlanSection
from ppcl_ds.units.plan import UnitPlan

BLOCKS = 8


def unit(u: int, v: int) -> UnitPlan:
    return UnitPlan(name=f"{u}-{v}", span=(u, v), streams=("image",))


def curve(exponent: float, noise: float = 0.0, seed: int = 0) -> list[tuple[int, float]]:
    random = np.random.default_rng(seed)
    return [(step, 3.0 * step**-exponent * float(np.exp(noise * random.normal()))) for step in range(10, 210, 10)]


def test_a_power_law_is_found() -> None:
    units = [unit(0, 1), unit(2, 3), unit(4, 7)]
    found = exponents(units, {each.name: curve(0.4) for each in units})
    assert found == pytest.approx([0.4, 0.4, 0.4], abs=0.002)
    mixed = exponents(units, {"0-1": curve(0.2), "2-3": curve(0.6), "4-7": curve(1.0)})
    assert mixed[0] < mixed[1] < mixed[2], "each one's own curve counts"
    assert mixed[0] > 0.2, "drawn towards what all have in common"
    assert mixed[2] < 1.0


def test_noise_is_drawn_towards_units_of_the_same_length() -> None:
    units = [unit(0, 1), unit(2, 3), unit(4, 7)]
    few = [(step, loss * factor) for (step, loss), factor in zip(curve(0.5)[-3:], (1.0, 1.3, 1.3), strict=True)]
    curves = {"0-1": curve(0.5), "2-3": few, "4-7": curve(0.1)}
    found = exponents(units, curves)
    steps, losses = np.log(np.array(few)).T
    alone = -np.polyfit(steps, losses, 1)[0]
    assert abs(found[1] - 0.5) < abs(alone - 0.5)
    assert exponents([*units, unit(0, 3)], curves)[3] == pytest.approx(found[2], abs=0.02), "that of its length"


def test_before_a_curve_says_anything_errors_fall_with_the_root_of_the_steps() -> None:
    units = [unit(0, 1), unit(2, 3)]
    assert exponents(units, {}) == [0.5, 0.5]
    assert exponents(units, {"0-1": [(10, 1.0), (20, 0.9)]}) == [0.5, 0.5]
    few = {"0-1": curve(1.0)[-3:], "2-3": curve(1.0)[-3:]}
    assert 0.5 < exponents(units, few)[0] < 1.0, "a few points say a little"
    assert factors([0.5, 0.5], 100, 400).tolist() == [0.5, 0.5]


def test_what_says_nothing_changes_nothing() -> None:
    units = [unit(0, 1), unit(2, 3)]
    spike = {"0-1": [(step, float("inf") if step == 100 else loss) for step, loss in curve(0.4)], "2-3": curve(0.4)}
    assert exponents(units, spike) == pytest.approx([0.4, 0.4], abs=0.002), "a loss that is not finite says nothing"
    rising = exponents(units, {each.name: curve(-0.3) for each in units})
    assert rising == [0.0, 0.0], "no unit is expected to get worse"
    assert factors([0.5, 0.5], 0, 100).tolist() == [1.0, 1.0]


def test_a_forecast_grows_as_what_units_add_does() -> None:
    """Held against the vectors themselves: what a unit adds to the velocity, smaller by the root of its factor."""
    random = np.random.default_rng(0)
    added = random.normal(size=(3, 500))
    gram = added @ added.T / 500
    units = (unit(0, 1), unit(2, 3), unit(4, 5))
    swaps = Swaps(checkpoint="", units=units, products={"velocity": gram.tolist()}, sets=[], seconds=[], trained=100)
    swaps.falls = [0.5, 0.2, 1.0]
    grown = fitted(swaps, "velocity").grown(swaps.factors(400))
    smaller = added * np.sqrt(np.array([4**-0.5, 4**-0.2, 4**-1.0]))[:, None]
    for places in ((0,), (0, 1), (0, 1, 2)):
        found = grown.of([units[place] for place in places])
        assert found is not None
        assert found["velocity"] == pytest.approx(np.mean(smaller[list(places)].sum(0) ** 2))


def test_steps_are_what_is_left() -> None:
    assert steps_each(3600, 10, 120, 5) == 120 + (3600 - 1200) / 5
    assert steps_each(1000, 10, 120, 5) == 120, "all of it is spent"


SPANS = [(0, 1), (0, 2), (0, 3), (1, 2), (2, 3), (3, 5), (4, 5), (4, 7), (5, 6), (6, 7)]


def library(seed: int) -> Swaps:
    """Units whose errors grow with what they replace, and overlap at random."""
    random = np.random.default_rng(seed)
    units = tuple(unit(*span) for span in SPANS)
    sizes = np.array([(v - u) ** 1.5 for u, v in SPANS]) * random.uniform(0.5, 2.0, len(SPANS))
    added = random.normal(size=(len(SPANS), 60)) * np.sqrt(sizes)[:, None]
    gram = added @ added.T / 60
    products = {"velocity": gram.tolist(), "draw": (gram * random.uniform(0.8, 1.2, gram.shape).mean()).tolist()}
    swaps = Swaps(checkpoint="", units=units, products=products, sets=[], seconds=[], trained=100)
    swaps.falls = random.uniform(0.2, 0.8, len(SPANS)).tolist()
    return swaps


def fitting(goal: float) -> list[tuple[str, ...]]:
    found = []
    for size in range(1, 5):
        for spans in combinations(SPANS, size):
            apart = all(a[1] < b[0] for a, b in pairwise(spans))
            if apart and abs(sum(v - u for u, v in spans) - goal) <= 0.5:
                found.append(tuple(f"{u}-{v}" for u, v in spans))
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("unit_steps", [1300, 3000, 20000])
def test_units_and_steps_are_chosen_together(seed: int, unit_steps: int) -> None:
    """Held against every pair of sets: at most 5 % of error behind the best, and never behind units chosen alone."""
    swaps, budget = library(seed), Budget("blocks", np.ones(BLOCKS), {})
    section = PlanSection(variants={"large": 0.25, "small": 0.5}, unit_steps=unit_steps)

    def worth(sets: dict[str, tuple[str, ...]]) -> float:
        size = len({name for names in sets.values() for name in names})
        each = steps_each(unit_steps, len(SPANS), swaps.trained, size)
        forecast = fitted(swaps, "pictures").grown(swaps.factors(each))
        units = {one.name: one for one in swaps.units}
        errors = [forecast.of([units[name] for name in names]) for names in sets.values()]
        return sum(log(forecast.value(each)) for each in errors if each is not None)

    found = choose_sets(section, swaps, budget, 1)
    best = min(worth({"large": a, "small": b}) for a, b in product(fitting(2), fitting(4)))
    assert worth(found) <= best + 2 * log(1.05)
    apart = Chooser(section, swaps, budget, fitted(swaps, section.objective), 1e9).sets(0.0)
    assert worth(found) <= worth(apart) + 1e-9


def test_where_steps_are_scarce_variants_share_units() -> None:
    swaps, budget = library(1), Budget("blocks", np.ones(BLOCKS), {})
    swaps.falls = [1.0] * len(SPANS)
    sizes = []
    for unit_steps in (1100, 10**6):
        section = PlanSection(variants={"large": 0.25, "medium": 0.375, "small": 0.5}, unit_steps=unit_steps)
        chosen = choose_sets(section, swaps, budget, 1)
        sizes.append(len({name for names in chosen.values() for name in names}))
    assert sizes[0] <= sizes[1]


def test_units_of_kept_variants_are_there_and_take_steps_too() -> None:
    """Where steps are scarce, a new variant shares the units of one that stays, though others cost less alone."""
    units = (unit(0, 1), unit(2, 3))
    products = {measure: [[1.0, 0.0], [0.0, 0.99]] for measure in ("velocity", "draw")}
    swaps = Swaps(checkpoint="", units=units, products=products, sets=[], seconds=[], trained=100, falls=[0.5, 0.5])
    section, budget = PlanSection(variants={"new": 0.125}, unit_steps=1000), Budget("blocks", np.ones(BLOCKS), {})
    assert choose_sets(section, swaps, budget, 1) == {"new": ("2-3",)}
    assert choose_sets(section, swaps, budget, 1, {"kept": ("0-1",)}) == {"new": ("0-1",)}
