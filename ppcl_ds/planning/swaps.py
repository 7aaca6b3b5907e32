"""What was measured of a trained library: every unit plugged in alone, and some sets of them together.

K units of the library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from ppcl_ds.errors import UserError, brief
from ppcl_ds.planning.growth import factors, steps_each
from ppcl_ds.units.plan import Plan, UnitPlan

SETS = 32
"""Sets that are measured; more of them hardly change what the forecast learns."""


Errors = Mapping[str, float]
"""Measure -> mean squared difference from the teacher."""


_AS_IT_IS = ConfigDict(ser_json_inf_nan="constants")
"""What is not finite is written as such; as null it could not be read again."""


class MeasuredSet(BaseModel):
    """Units that were plugged in together, and what came of it.

    Attributes:
        errors: by measure.
        by_noise: of the measures that are of a noise level, the error at each, the noisiest first.
        removed: errors of the teacher without the blocks that these units take out, nothing trained; empty: not
            measured.
    """

    model_config = _AS_IT_IS

    units: tuple[str, ...]
    errors: dict[str, float]
    by_noise: dict[str, list[float]] = {}
    removed: dict[str, float] = {}


class Swaps(BaseModel):
    """What `ppcl plan --from-run` has measured.

    Attributes:
        checkpoint: folder of the checkpoint that the units come from.
        units: the library.
        products: measure -> (K, K), for every two units the mean product of what either alone adds to what is measured;
            on the diagonal each one's mean squared error.
        sets: sets of two and more units plugged in together.
        seconds: of each of the teacher's blocks, for one sample.
        saved: seconds that each width unit saves, by name.
        trained: steps that the units have been trained for.
        falls: (K,) how fast each one's error falls with its steps, see `growth.exponents`.
    """

    model_config = _AS_IT_IS

    checkpoint: str
    units: tuple[UnitPlan, ...]
    products: dict[str, list[list[float]]]
    sets: list[MeasuredSet]
    seconds: list[float]
    saved: dict[str, float] = {}
    trained: int = 0
    falls: list[float] = []

    def factors(self, steps: float) -> NDArray[np.float64]:
        """(K,) what the errors of every unit are multiplied with once it has been trained for `steps` steps."""
        return factors(self.falls or [0.0] * len(self.units), self.trained, steps)

    def last_step(self, unit_steps: int | None, steps: int, units: int) -> float:
        """The step at which the training of a library of so many of these units ends.

        Args:
            unit_steps: `plan.unit_steps`; None: every unit is trained for `steps`, `distill.steps`.
        """
        if unit_steps is None:
            return float(max(steps, self.trained))
        return steps_each(unit_steps, len(self.units), self.trained, units)

    def errors_of(self, names: Iterable[str]) -> Errors | None:
        """The measured errors of a set of units; None where it was not measured."""
        wanted = set(names)
        for place, unit in enumerate(self.units):
            if wanted == {unit.name}:
                return {measure: products[place][place] for measure, products in self.products.items()}
        found = self.set_of(wanted)
        return found.errors if found else None

    def set_of(self, names: Iterable[str]) -> MeasuredSet | None:
        """What was measured of these units together; None where nothing was."""
        wanted = set(names)
        return next((each for each in self.sets if set(each.units) == wanted), None)


def load_swaps(path: Path) -> Swaps | None:
    """What was measured before; None where nothing was, and, with a line, where an earlier version did.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict) and isinstance(content.get("products"), list):
            print(f"{path} holds velocity errors alone, as earlier versions measured; --from-run measures anew")
            return None
        return Swaps.model_validate(content)
    except (OSError, ValueError, ValidationError) as fault:
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
