"""What was measured of a trained library: every unit plugged in alone, and some sets of them together.

K units of the library.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from ppcl_ds.errors import UserError, brief
from ppcl_ds.units.plan import Plan, UnitPlan

SETS = 32
"""Sets that are measured; more of them hardly change what the forecast learns."""


class MeasuredSet(BaseModel):
    """Units that were plugged in together, and the velocity error that came of it."""

    units: tuple[str, ...]
    error: float


class Swaps(BaseModel):
    """What `ppcl plan --from-run` has measured.

    Attributes:
        checkpoint: folder of the checkpoint that the units come from.
        units: the library.
        products: (K, K) for every two units, the mean product of what either alone adds to the velocity; on the
            diagonal each one's mean squared error.
        sets: sets of two and more units plugged in together.
        seconds: of each of the teacher's blocks, for one sample.
        saved: seconds that each width unit saves, by name.
    """

    checkpoint: str
    units: tuple[UnitPlan, ...]
    products: list[list[float]]
    sets: list[MeasuredSet]
    seconds: list[float]
    saved: dict[str, float] = {}

    def error_of(self, names: Iterable[str]) -> float | None:
        """The measured error of a set of units; None where it was not measured."""
        wanted = set(names)
        alone = [((unit.name,), self.products[place][place]) for place, unit in enumerate(self.units)]
        measured = [*alone, *((each.units, each.error) for each in self.sets)]
        return next((error for units, error in measured if set(units) == wanted), None)


def load_swaps(path: Path) -> Swaps | None:
    """What was measured before; None where nothing was.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return Swaps.model_validate_json(path.read_text())
    except (OSError, ValidationError) as fault:
        raise UserError(f"{path} cannot be read ({brief(fault)}); delete it, it is measured anew") from None


def draw_sets(library: Plan, seed: int, count: int = SETS) -> list[tuple[str, ...]]:
    """Random sets of units that fit together, two and more, small ones and large ones by turns.

    Fewer than `count` where the library does not give so many.
    """
    random = np.random.default_rng(seed)
    drawn: dict[tuple[str, ...], None] = {}
    for attempt in range(20 * count):
        taken: list[UnitPlan] = []
        for place in random.permutation(len(library.units)):
            unit = library.units[place]
            if not any(unit.footprint & other.footprint for other in taken):
                taken.append(unit)
        if len(taken) > 1:
            size = 2 + attempt % (len(taken) - 1)
            drawn[tuple(unit.name for unit in sorted(taken[:size], key=lambda unit: unit.span))] = None
        if len(drawn) == count:
            break
    return list(drawn)
