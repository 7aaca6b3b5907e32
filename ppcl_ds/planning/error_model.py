"""What a set of units is expected to cost: the probe's errors added up, or a model fitted to a measured library.

K units that may be plugged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ppcl_ds.planning.budget import Budget
from ppcl_ds.planning.programme import Candidates
from ppcl_ds.planning.swaps import Swaps
from ppcl_ds.probing.report import ProbeReport
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import UnitPlan

Array = NDArray[np.float64]

_RIDGE = 0.1
"""Pull of the units' own coefficients towards zero; between 0.03 and 0.3 it makes little difference."""


@dataclass(frozen=True)
class ErrorModel:
    """The expected error of any set of units: each one's own, and what every two of them add to that.

    Attributes:
        title: what is expected, for tables and plots.
        units: those that may be plugged.
        alone: (K,) error of each by itself.
        pairs: (K, K) symmetric, zero on the diagonal.
    """

    title: str
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

    def candidates(self, budget: Budget) -> Candidates:
        return Candidates(
            footprints=[unit.footprint for unit in self.units],
            saved=np.array([budget.saved([unit]) for unit in self.units]),
            errors=self.alone,
            pairs=self.pairs,
        )


def probed(report: ProbeReport, teacher: Teacher) -> ErrorModel:
    """Every span that was probed, its `error(u, v)`, and no word on how errors add up."""
    errors = {(u, v): report.error[u][v] for u, v in sorted(teacher.allowed_spans)}
    known = {span: error for span, error in errors.items() if error is not None}
    units = [UnitPlan(name=f"{span}", span=span, streams=("image",)) for span in known]
    return ErrorModel("probed error", units, np.array(list(known.values())), np.zeros((len(units), len(units))))


def fitted(swaps: Swaps) -> ErrorModel:
    """The velocity error as measured for units alone, and as sets of them tell how errors build up.

    What units add to the velocity overlaps, and a unit also bends what earlier ones have added. So with g_ij the mean
    product of what units i and j add alone, a set costs

        sum_i g_ii + sum_{i<j} (2 a g_ij + (c_i + c_j) sqrt(g_ii g_jj)).

    With a = 1, c = 0 nothing bends. One a and a c for each unit are fitted to the measured sets by least squares of the
    relative error, c with a ridge.
    """
    products = np.array(swaps.products)
    alone = products.diagonal().copy()
    roots = np.sqrt(np.outer(alone, alone))
    place = {unit.name: index for index, unit in enumerate(swaps.units)}
    rows, sides = [], []
    for each in swaps.sets:
        chosen = [place[name] for name in each.units]
        overlap = products[np.ix_(chosen, chosen)].sum() - alone[chosen].sum()
        bends = np.zeros(len(alone))
        bends[chosen] = roots[np.ix_(chosen, chosen)].sum(1) - alone[chosen]
        rows.append(np.array([overlap, *bends]) / each.error)
        sides.append((each.error - alone[chosen].sum()) / each.error)
    if not rows:
        return ErrorModel("velocity MSE", swaps.units, alone, 2 * (products - np.diag(alone)))
    matrix = np.array(rows)
    pull = np.diag([1e-6, *np.full(len(alone), _RIDGE)])
    weights = np.linalg.solve(matrix.T @ matrix + pull, matrix.T @ np.array(sides))
    pairs = 2 * weights[0] * products + (weights[1:, None] + weights[None, 1:]) * roots
    np.fill_diagonal(pairs, 0.0)
    return ErrorModel("velocity MSE", swaps.units, alone, pairs)
