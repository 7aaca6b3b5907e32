"""The integer programme: of all units that might be plugged, those that give up a budget at the least error."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Array = NDArray[np.float64]

Weights = tuple[float, float]

_SECONDS = 60.0
"""Longest search of one programme; of a few dozen units what is found by then is within a percent of the best."""

_AT_LEAST = 4
"""Programmes that a search for the least product has time for."""

_SAME = 1e-4
"""Errors that differ by less are the same, as the solver does not look closer."""

_NEXT = 1e-6
"""Weight of the measure that is not aimed at."""

_LEAST = 1e-30
"""No error is smaller."""


@dataclass(frozen=True)
class Candidates:
    """K units that a variant may plug.

    Attributes:
        footprints: for each, the parts of the teacher that it takes the place of; no part may be replaced twice.
        saved: (K,) what each gives up, in the budget's unit.
        errors: (K,) what each costs alone.
        pairs: (K, K) symmetric, what two cost together beyond both alone; zero where that is not known.
    """

    footprints: Sequence[frozenset[Hashable]]
    saved: Array
    errors: Array
    pairs: Array

    def conflicts(self) -> Array:
        """(parts, K): 1 where a unit takes the place of a part."""
        parts = sorted({part for footprint in self.footprints for part in footprint}, key=repr)
        return np.array([[part in footprint for footprint in self.footprints] for part in parts], dtype=float)

    def total(self, chosen: Sequence[int]) -> float:
        """What a set costs."""
        places = list(chosen)
        return float(self.errors[places].sum() + self.pairs[np.ix_(places, places)].sum() / 2)


def weighted(candidates: Sequence[Candidates], weights: Sequence[float]) -> Candidates:
    """The same units, at the weighted sum of what they cost by several measures."""
    pairs = list(zip(weights, candidates, strict=True))
    errors = sum((weight * each.errors for weight, each in pairs), np.zeros_like(candidates[0].errors))
    products = sum((weight * each.pairs for weight, each in pairs), np.zeros_like(candidates[0].pairs))
    return replace(candidates[0], errors=errors, pairs=products)


def least_product(
    candidates: Sequence[Candidates], least: float, most: float, seconds: float = _AT_LEAST * _SECONDS
) -> list[int] | None:
    """The units whose errors by one or two measures have the least product, among those of `cheapest`.

    log v + log d is concave in (v, d). Over the points that sets can reach, its minimum is a vertex of their convex
    hull, and that is the least of w v + (1 - w) d for some weight w: a programme of `cheapest`. The two ends are the
    least v and the least d. Between two vertices that are known, the weights of the line through them find the one that
    lies furthest below it, if there is any. What else may lie there is above the lines through both that their own
    weights have shown, so no better than the corner where these meet; where that is no better than what is known,
    nothing is searched. So the optimum is found, not only one that small changes of w do not better.

    Args:
        seconds: after so many nothing new is searched, and the best so far is taken; a quarter of it for a programme.

    Returns:
        Their places among the candidates; None where no set will do.
    """
    if len(candidates) == 1:
        return cheapest(candidates[0], least, most, seconds / _AT_LEAST)
    end = time.monotonic() + seconds
    assert len(candidates) == 2, "a hull in the plane"

    def solved(weights: tuple[float, float]) -> _Vertex | None:
        chosen = cheapest(weighted(candidates, weights), least, most, seconds / _AT_LEAST)
        if chosen is None:
            return None
        return _Vertex(chosen, *(max(each.total(chosen), _LEAST) for each in candidates))

    # At an end, the other measure decides between equals.
    scale = [float(np.abs(each.errors).max(initial=0.0)) or 1.0 for each in candidates]
    ends = (1 / scale[0], _NEXT / scale[1]), (_NEXT / scale[0], 1 / scale[1])
    first, last = map(solved, ends)
    if first is None or last is None:
        return (first or last or _Vertex(None, 0.0, 0.0)).chosen
    best = min(first, last, key=_Vertex.product)
    open_parts = [(first, ends[0], last, ends[1])]
    while open_parts and time.monotonic() < end:
        left, left_weights, right, right_weights = open_parts.pop()
        if right.v - left.v <= _SAME * right.v or left.d - right.d <= _SAME * left.d:
            continue
        if _corner(left, left_weights, right, right_weights) >= best.product() * (1 - _SAME):
            continue
        weights = left.d - right.d, right.v - left.v
        middle = solved(weights)
        if middle is None or middle.at(weights) >= left.at(weights) * (1 - _SAME):
            continue
        best = min(best, middle, key=_Vertex.product)
        open_parts += [(left, left_weights, middle, weights), (middle, weights, right, right_weights)]
    return best.chosen


class _Vertex(NamedTuple):
    """A set, and its errors by two measures."""

    chosen: list[int] | None
    v: float
    d: float

    def product(self) -> float:
        return self.v * self.d

    def at(self, weights: tuple[float, float]) -> float:
        return weights[0] * self.v + weights[1] * self.d


def _corner(left: _Vertex, left_weights: Weights, right: _Vertex, right_weights: Weights) -> float:
    """The product where the lines through two vertices meet, below which no set lies."""
    matrix = np.array([left_weights, right_weights])
    if abs(np.linalg.det(matrix)) < _LEAST:
        return min(left.product(), right.product())
    v, d = np.linalg.solve(matrix, [left.at(left_weights), right.at(right_weights)])
    return float(max(v, 0.0) * max(d, 0.0))


def cheapest(candidates: Candidates, least: float, most: float, seconds: float = _SECONDS) -> list[int] | None:
    """The units of least total error among those sets that give up between `least` and `most`.

    Minimises `sum_i e_i x_i + sum_{i<j} p_ij x_i x_j` over binary x. Each product is a variable of its own, held to
    `x_i + x_j - 1 <= y_ij <= x_i, x_j` (McCormick's envelope), so that scipy's HiGHS can solve it as a linear programme
    over integers.

    Args:
        seconds: longest search, at most `_SECONDS`; then the best so far is taken.

    Returns:
        Their places among the candidates; None where no set will do. Never the empty set: that is the teacher.
    """
    count = len(candidates.errors)
    if not count:
        return None
    conflicts = candidates.conflicts()
    apart = conflicts.T @ conflicts == 0
    first, second = np.nonzero(np.triu((candidates.pairs != 0) & apart, k=1))
    costs = np.concatenate([candidates.errors, candidates.pairs[first, second]])
    # The solver's tolerances are absolute: errors become large numbers, and what is given up about a unit each.
    size = np.abs(candidates.saved).max() or 1.0
    units = np.ones((1, count))
    constraints = [
        LinearConstraint(_wide(conflicts, len(costs)), -np.inf, 1),
        LinearConstraint(_wide(units, len(costs)), 1, np.inf),
        LinearConstraint(_wide(candidates.saved[None] / size, len(costs)), least / size, most / size),
        *_products(first, second, count, candidates.pairs[first, second]),
    ]
    solution = milp(
        c=costs * (1e4 / (np.abs(costs).max() or 1.0)),
        integrality=np.concatenate([np.ones(count), np.zeros(len(first))]),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-9 if not len(first) else 1e-4, "time_limit": min(seconds, _SECONDS)},
        constraints=constraints,
    )
    if solution.x is None:
        return None
    return [index for index in range(count) if solution.x[index] > 0.5]


def _wide(matrix: Array, width: int) -> csr_array:
    """A constraint on the units alone, as one on all variables."""
    return csr_array(np.pad(matrix, ((0, 0), (0, width - matrix.shape[1]))))


def _products(first: NDArray, second: NDArray, count: int, costs: Array) -> list[LinearConstraint]:
    """What ties each product to its factors: only the side that the costs push against is needed."""
    places = np.arange(len(first)) + count
    width = count + len(first)
    held_up, held_down = np.nonzero(costs > 0)[0], np.nonzero(costs < 0)[0]
    made = []
    if len(held_up):
        rows = _rows([(first[held_up], 1.0), (second[held_up], 1.0), (places[held_up], -1.0)], width)
        made.append(LinearConstraint(rows, -np.inf, 1))
    for factor in (first, second):
        if len(held_down):
            rows = _rows([(places[held_down], 1.0), (factor[held_down], -1.0)], width)
            made.append(LinearConstraint(rows, -np.inf, 0))
    return made


def _rows(entries: Sequence[tuple[NDArray, float]], width: int) -> csr_array:
    """A sparse matrix with, in row r, each value at the r-th of its columns."""
    height = len(entries[0][0])
    values = np.concatenate([np.full(height, value) for _, value in entries])
    columns = np.concatenate([columns for columns, _ in entries])
    return csr_array((values, (np.tile(np.arange(height), len(entries)), columns)), shape=(height, width))
