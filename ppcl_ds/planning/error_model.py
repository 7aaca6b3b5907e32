"""What a set of units is expected to cost: the probe's errors added up, or models fitted to a measured library.

K units that may be plugged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, log

import numpy as np
from numpy.typing import NDArray

from ppcl_ds.planning.budget import Budget
from ppcl_ds.planning.programme import Candidates, least_product
from ppcl_ds.planning.swaps import Errors, Swaps
from ppcl_ds.probing.report import ProbeReport
from ppcl_ds.sections import Objective
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import UnitPlan

Array = NDArray[np.float64]

TITLES = {
    "error": "probed error",
    "velocity": "velocity MSE",
    "branches": "branch MSE",
    "draw": "few-step MSE",
}
"""Measure -> what it is called in tables and plots."""

MEASURES: Mapping[Objective, tuple[str, ...]] = {
    "pictures": ("velocity", "draw"),
    "velocity": ("velocity",),
    "branches": ("branches",),
    "draw": ("draw",),
}
"""Objective -> the measures whose logarithms it is the mean of."""

_RIDGE = 0.1
"""Pull of the units' own coefficients towards zero; between 0.03 and 0.3 it makes little difference."""

_LEAST = 1e-30
"""No error is smaller: of those that are forecast, a logarithm is taken."""


@dataclass(frozen=True)
class ErrorModel:
    """The expected error of any set of units by one measure: each one's own, and what every two of them add to that.

    Attributes:
        units: those that may be plugged.
        alone: (K,) error of each by itself.
        pairs: (K, K) symmetric, zero on the diagonal.
    """

    units: Sequence[UnitPlan]
    alone: Array
    pairs: Array

    def of(self, units: Iterable[UnitPlan]) -> float | None:
        """The expected error of a set of units; None where one of them is not known."""
        places = {unit.replaces: place for place, unit in enumerate(self.units)}
        try:
            chosen = [places[unit.replaces] for unit in units]
        except KeyError:
            return None
        return float(self.alone[chosen].sum() + self.pairs[np.ix_(chosen, chosen)].sum() / 2)

    def grown(self, factors: Array) -> ErrorModel:
        """The same units after more training, each one's error multiplied with its own factor (K,).

        What a unit adds is then smaller by the root of its factor, and so is what two add together.
        """
        roots = np.sqrt(factors)
        return replace(self, alone=self.alone * factors, pairs=self.pairs * np.outer(roots, roots))

    def candidates(self, budget: Budget) -> Candidates:
        return Candidates(
            footprints=[unit.footprint for unit in self.units],
            saved=np.array([budget.saved([unit]) for unit in self.units]),
            errors=self.alone,
            pairs=self.pairs,
        )


@dataclass(frozen=True)
class Forecast:
    """A model of every measure, and which of them are to be small.

    Attributes:
        models: by measure; all of the same units.
        aims: the measures of the objective, the mean of their logarithms. Each is meant relative to what removing
            blocks without training costs at that size, which is one number for all sets that a variant is chosen from,
            so it changes no choice and is left out of what is minimised. (Relative to each set's own removal, blocks
            would be chosen because they are missed.)
    """

    models: Mapping[str, ErrorModel]
    aims: tuple[str, ...]

    @property
    def units(self) -> Sequence[UnitPlan]:
        return self.models[self.aims[0]].units

    @property
    def titles(self) -> dict[str, str]:
        """What every measure is called."""
        return {measure: TITLES[measure] for measure in self.models}

    @property
    def title(self) -> str:
        """What the objective is called."""
        names = [TITLES[aim] for aim in self.aims]
        return names[0] if len(names) == 1 else f"geometric mean of {' and '.join(names)}"

    def of(self, units: Iterable[UnitPlan]) -> dict[str, float] | None:
        """The expected errors of a set of units, by measure; None where one of them is not known."""
        wanted = list(units)
        found = {measure: model.of(wanted) for measure, model in self.models.items()}
        known = {measure: error for measure, error in found.items() if error is not None}
        return known if len(known) == len(found) else None

    def grown(self, factors: Array) -> Forecast:
        """The forecast after more training, see `ErrorModel.grown`."""
        return replace(self, models={measure: model.grown(factors) for measure, model in self.models.items()})

    def value(self, errors: Errors) -> float:
        """The objective: the geometric mean of the errors that are aimed at, whose logarithm is the mean of theirs.

        Infinite where one of them is not finite.
        """
        if not all(isfinite(errors[aim]) for aim in self.aims):
            return inf
        return exp(sum(log(max(errors[aim], _LEAST)) for aim in self.aims) / len(self.aims))

    def saved(self, budget: Budget) -> Array:
        """(K,) what every unit gives up."""
        return np.array([budget.saved([unit]) for unit in self.units])

    def best(
        self, budget: Budget, least: float, most: float, charge: Array | None = None, **search: float
    ) -> list[int] | None:
        """Places of the units of least objective that give up between `least` and `most`; None: no set does.

        Args:
            charge: (K,) what each unit adds to every error for being plugged at all, as a share of what the best set
                without charges costs.
            search: see `least_product`.
        """
        free = [self.models[aim].candidates(budget) for aim in self.aims]
        chosen = least_product(free, least, most, **search)
        if chosen is None or charge is None or not charge.any():
            return chosen
        charged = [replace(each, errors=each.errors + charge * each.total(chosen)) for each in free]
        return least_product(charged, least, most, **search)


def probed(report: ProbeReport, teacher: Teacher) -> Forecast:
    """Every span that was probed, its `error(u, v)`, and no word on how errors add up."""
    errors = {(u, v): report.error[u][v] for u, v in sorted(teacher.allowed_spans)}
    known = {span: error for span, error in errors.items() if error is not None}
    units = [UnitPlan(name=f"{span}", span=span, streams=("image",)) for span in known]
    model = ErrorModel(units, np.array(list(known.values())), np.zeros((len(units), len(units))))
    return Forecast({"error": model}, ("error",))


def unknown() -> Forecast:
    """Where nothing has been probed."""
    return Forecast({"error": ErrorModel((), np.zeros(0), np.zeros((0, 0)))}, ("error",))


def fitted(swaps: Swaps, objective: Objective) -> Forecast:
    """A model of every measure; where `draw` was not measured, `pictures` is the velocity alone."""
    aims = tuple(measure for measure in MEASURES[objective] if measure in swaps.products)
    return Forecast({measure: fitted_model(swaps, measure) for measure in swaps.products}, aims)


def fitted_model(swaps: Swaps, measure: str) -> ErrorModel:
    """An error as measured for units alone, and as sets of them tell how errors build up.

    What units add overlaps, and a unit also bends what earlier ones have added. So with g_ij the mean product of what
    units i and j add alone, a set costs

        sum_i g_ii + sum_{i<j} (2 a g_ij + (c_i + c_j) sqrt(g_ii g_jj)).

    With a = 1, c = 0 nothing bends. One a and a c for each unit are fitted to the measured sets by least squares of the
    relative error, c with a ridge. Sets whose error is not finite say nothing of others.
    """
    products = np.array(swaps.products[measure])
    alone = products.diagonal().copy()
    roots = np.sqrt(np.outer(alone, alone))
    place = {unit.name: index for index, unit in enumerate(swaps.units)}
    rows, sides = [], []
    for each in swaps.sets:
        chosen, error = [place[name] for name in each.units], each.errors[measure]
        if not isfinite(error):
            continue
        overlap = products[np.ix_(chosen, chosen)].sum() - alone[chosen].sum()
        bends = np.zeros(len(alone))
        bends[chosen] = roots[np.ix_(chosen, chosen)].sum(1) - alone[chosen]
        rows.append(np.array([overlap, *bends]) / error)
        sides.append((error - alone[chosen].sum()) / error)
    if not rows:
        return ErrorModel(swaps.units, alone, 2 * (products - np.diag(alone)))
    matrix = np.array(rows)
    pull = np.diag([1e-6, *np.full(len(alone), _RIDGE)])
    weights = np.linalg.solve(matrix.T @ matrix + pull, matrix.T @ np.array(sides))
    pairs = 2 * weights[0] * products + (weights[1:, None] + weights[None, 1:]) * roots
    np.fill_diagonal(pairs, 0.0)
    return ErrorModel(swaps.units, alone, pairs)
