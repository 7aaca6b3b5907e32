"""What blocks weigh and what units save: in parameters, in bytes, or in seconds on the device at hand.

M blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ppcl_ds.planning.swaps import Swaps
from ppcl_ds.sections import Plan as PlanSection
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.kinds import parameters_saved
from ppcl_ds.units.plan import UnitPlan


@dataclass(frozen=True)
class Budget:
    """The scale that variants are weighed on.

    Attributes:
        title: what is counted.
        blocks: (M,) what each block weighs.
        parts: what each width unit saves, by name.
    """

    title: str
    blocks: NDArray[np.float64]
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return float(self.blocks.sum())

    @property
    def slack(self) -> float:
        """Half a block: blocks cannot be split, so a goal is met no better than that."""
        return 0.501 * float(self.blocks.max())

    def tolerance(self, saved: NDArray[np.float64]) -> float:
        """How far from its goal a variant may be: half of what the smallest unit saves, at most half a block.

        Args:
            saved: what each unit that may be plugged saves. Where some save next to nothing, half a percent of the
                whole is near enough: a goal that is met to the last parameter would leave no choice.
        """
        smallest = float(saved[saved > 0].min(initial=np.inf))
        return min(self.slack, max(0.5 * smallest, 0.005 * self.total))

    def saved(self, units: Iterable[UnitPlan]) -> float:
        """What units save together. A depth unit is as large as its first block."""
        return sum(
            float(self.blocks[list(unit.members)].sum()) if unit.takes_blocks else self.parts[unit.name]
            for unit in units
        )


def budget_of(
    section: PlanSection,
    teacher: Teacher,
    dtype: torch.dtype,
    units: Iterable[UnitPlan] = (),
    swaps: Swaps | None = None,
) -> Budget:
    """The recipe's budget.

    Args:
        dtype: of the run.
        units: those that will be asked about.
        swaps: what was measured; without it, parameters stand for seconds.
    """
    if section.budget == "latency" and swaps is not None:
        return Budget("latency", np.array(swaps.seconds), swaps.saved)

    def weigh(name: str, parameter: nn.Parameter) -> int:
        return parameter.numel() * (teacher.files.runs_as(name, dtype).itemsize if section.budget == "memory" else 1)

    weights = {name: weigh(name, parameter) for name, parameter in teacher.empty.named_parameters()}
    blocks = [sum(size for name, size in weights.items() if name.startswith(f"{b.key}.")) for b in teacher.blocks]
    scale = dtype.itemsize if section.budget == "memory" else 1
    parts = {unit.name: float(scale * parameters_saved(unit, teacher)) for unit in units if not unit.takes_blocks}
    return Budget("memory" if section.budget == "memory" else "parameters", np.array(blocks, dtype=float), parts)
