"""What more training is worth: how a unit's error falls with its steps, and how many steps a library can have.

K units of the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray

from ppcl_ds.units.plan import UnitPlan

Array = NDArray[np.float64]
Curve = Sequence[tuple[int, float]]
"""(step, loss) of a unit as it was trained."""

_TAIL = 4
"""Curves are read from a `_TAIL`-th of their last step on: warm-up says nothing of what comes."""

_POINTS = 8.0
"""So many points of a unit's own curve weigh as much as what units of its length have in common."""

_USUAL = 0.5
"""What all units are taken to have in common before a curve says anything: errors fall with the root of the steps."""

_STEEPEST = 1.5
"""No exponent is larger: what falls faster has only begun."""


def exponents(units: Sequence[UnitPlan], curves: Mapping[str, Curve]) -> list[float]:
    """How fast every unit's error falls: after n steps it is that after n_0 times (n / n_0) ** -a.

    The a of a unit is the slope of its own logarithmic curve, by least squares over the tail, drawn towards the mean of
    the units that replace as many blocks as it does, these towards the mean of all, and that towards a half: noise of a
    few points is not taken for a gift, and a run that has logged too few is not taken for one that no step improves.
    Training losses and errors of pictures are both squares of what a unit does wrong, so one stands for the other.
    Power laws of training are as in Kaplan et al., arXiv 2001.08361.

    Args:
        curves: unit -> its curve; units without one get what the others have in common.

    Returns:
        (K,) in 0 to `_STEEPEST`.
    """
    own = [_slope(curves.get(unit.name, ())) for unit in units]
    lengths = [unit.span[1] - unit.span[0] if unit.takes_blocks else -1 for unit in units]
    common = _mean([each for each in own if each], (_USUAL, _POINTS))
    priors = {
        length: _mean([each for each, other in zip(own, lengths, strict=True) if each and other == length], common)
        for length in set(lengths)
    }
    return [
        float(np.clip(_drawn(each, priors[length]) if each else priors[length][0], 0.0, _STEEPEST))
        for each, length in zip(own, lengths, strict=True)
    ]


def _slope(curve: Curve) -> tuple[float, float] | None:
    """A curve's exponent and how many finite points have told it; None where they are too few."""
    points = [(step, loss) for step, loss in curve if 0 < loss < inf and step * _TAIL >= curve[-1][0]]
    if len({step for step, _ in points}) < 3:
        return None
    steps, losses = np.log(np.array(points, dtype=float)).T
    return -float(np.polyfit(steps, losses, 1)[0]), float(len(points))


def _mean(slopes: Sequence[tuple[float, float]], prior: tuple[float, float]) -> tuple[float, float]:
    """The mean exponent of several curves, drawn towards a prior, and the points behind it."""
    points = sum(count for _, count in slopes)
    if not points:
        return prior
    own = sum(slope * count for slope, count in slopes) / points
    return _drawn((own, points), prior), points


def _drawn(own: tuple[float, float], prior: tuple[float, float]) -> float:
    return (own[0] * own[1] + prior[0] * _POINTS) / (own[1] + _POINTS)


def factors(falls: Sequence[float], trained: int, steps: float) -> Array:
    """(K,) what errors after `trained` steps are multiplied with after `steps`; all 1 where nothing was trained.

    Args:
        falls: what `exponents` has found.
    """
    if not trained:
        return np.ones(len(falls))
    return np.power(max(steps, 1.0) / trained, -np.array(falls))


def steps_each(unit_steps: int, scouted: int, trained: int, units: int) -> float:
    """The steps of every unit of a library, where training costs `unit_steps` in all: steps of units, added up.

    Args:
        scouted: units that have been trained for `trained` steps; that is spent.
        units: those that are kept, and share what is left.
    """
    return trained + max(unit_steps - scouted * trained, 0) / units
