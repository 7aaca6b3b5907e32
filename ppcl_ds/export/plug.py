"""Plugging after training: a variant with some of its units switched back to the teacher's blocks, or others added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from ppcl_ds.errors import UserError
from ppcl_ds.units.plan import Plan, conflict


def read_switches(words: Sequence[str]) -> dict[str, bool]:
    """`UNIT=on` and `UNIT=off` as unit -> whether it is to be plugged; of two for one unit the last one counts.

    Raises:
        UserError: a word is neither.
    """
    switches: dict[str, bool] = {}
    for word in words:
        unit, _, state = word.rpartition("=")
        if not unit or state not in ("on", "off"):
            raise UserError(f"--plug: '{word}' is not UNIT=on or UNIT=off")
        switches[unit] = state == "on"
    return switches


def replug(plan: Plan, trained: Plan, variant: str, switches: Mapping[str, bool]) -> Plan:
    """The plan with one variant changed.

    Args:
        trained: the plan that training began with; its units can be plugged even if `plan` has dropped them since.
        switches: unit -> whether the variant is to have it; units not named stay as they are.

    Raises:
        UserError: a unit is not known, or two that are to be plugged get in each other's way.
    """
    known = {unit.name for unit in plan.units}
    library = (*plan.units, *(unit for unit in trained.units if unit.name not in known))
    names = [unit.name for unit in library]
    for unit in switches:
        if unit not in names:
            raise UserError(f"--plug: unit '{unit}' is not in the library; it has: {', '.join(names)}")
    before = {unit.name for unit in plan.units_of(variant)}
    chosen = tuple(name for name in names if switches.get(name, name in before))
    changed = plan.model_copy(update={"units": library, "variants": {variant: chosen}})
    for a, b in combinations(changed.units_of(variant), 2):
        if reason := conflict(a, b):
            raise UserError(f"--plug: {reason}; plug one of them, and turn the other off")
    return changed
