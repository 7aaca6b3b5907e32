"""From a probe report, or from a measured library, to a plan: which units every variant plugs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import log
from typing import NoReturn

import numpy as np

from ppcl_ds.errors import UserError
from ppcl_ds.planning.budget import Budget
from ppcl_ds.planning.error_model import Forecast, fitted
from ppcl_ds.planning.rules import RuleInputs, Span, spans_by
from ppcl_ds.planning.swaps import Swaps
from ppcl_ds.probing.report import ProbeReport
from ppcl_ds.sections import Plan as PlanSection
from ppcl_ds.sections import Rule
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import Plan, UnitPlan, load_plan
from ppcl_ds.units.spec import Stream


def make_plan(section: PlanSection, seed: int, report: ProbeReport | None, teacher: Teacher, budget: Budget) -> Plan:
    """Choose spans for every variant by the recipe's rule, and gather them, with all candidates, into one library.

    Args:
        seed: of rule `random`.
        report: None where a plan is given and nothing is chosen.

    Raises:
        UserError: no set of spans reaches a variant's share.
    """
    given = load_plan(section.given, teacher) if section.given else None
    rules = dict.fromkeys((section.rule, *section.candidates))
    found: dict[Rule, dict[str, list[Span] | None]] = {section.rule: {}}
    if report is not None:
        inputs = _rule_inputs(section, seed, report, teacher, budget, given)
        found = {
            rule: {name: spans_by(rule, inputs, share) for name, share in section.variants.items()} for rule in rules
        }
    for name, chosen in found[section.rule].items():
        if not chosen:
            _refuse(name, section)
    own = given.units if given and "given" in rules else ()
    units = {unit.span: unit for unit in own if unit.takes_blocks}
    for span in sorted({span for sets in found.values() for spans in sets.values() for span in spans or ()}):
        assert report is not None, "spans were chosen by it"
        units.setdefault(span, _unit(span, report, teacher.anatomy))
    width = [unit for unit in own if not unit.takes_blocks]
    known = {unit.replaces for unit in width}
    width += [unit for unit in width_candidates(section, teacher) if unit.replaces not in known]
    variants = dict(given.variants) if given and section.rule == "given" else {}
    variants |= {name: tuple(units[s].name for s in spans or ()) for name, spans in found[section.rule].items()}
    library = (*(units[span] for span in sorted(units)), *width)
    return Plan(teacher=teacher.class_name, blocks=len(teacher.blocks), units=library, variants=variants)


def _rule_inputs(
    section: PlanSection,
    seed: int,
    report: ProbeReport,
    teacher: Teacher,
    budget: Budget,
    given: Plan | None,
) -> RuleInputs:
    lists: dict[str, list[int]] = {}
    for block in teacher.blocks:
        lists.setdefault(block.list_name, []).append(block.index)
    return RuleInputs(
        report=report,
        budget=budget,
        lists=list(lists.values()),
        allowed=teacher.plannable_spans,
        max_span=section.max_span,
        seed=seed,
        given=[unit.span for unit in given.units if unit.takes_blocks] if given else [],
    )


def _unit(span: Span, report: ProbeReport, anatomy: Anatomy) -> UnitPlan:
    name = f"blocks_{span[0]:02d}_{span[1]:02d}"
    return UnitPlan(name=name, span=span, streams=report.used_streams(anatomy.blocks[span[1]]))


def width_candidates(section: PlanSection, teacher: Teacher) -> list[UnitPlan]:
    """The width units that the recipe would have in the library, wherever a block has what they need."""
    units, anatomy = [], teacher.anatomy
    for block in anatomy.blocks:
        closes = block.index == len(anatomy) - 1
        streams = tuple(stream for stream in block.ffn if not (closes and stream == "text"))
        if "ffn" in section.width:
            units += [_ffn(block.index, (stream,), 0.0) for stream in streams]
        if "narrow" in section.width and streams:
            units.append(_ffn(block.index, streams, section.narrow_keep))
        follows = anatomy.blocks[block.index + 1] if not closes else block
        if "text" in section.width and not block.last and block.text_only and follows.text_only:
            name, span = f"text_{block.index:02d}_{follows.index:02d}", (block.index, follows.index)
            behind: tuple[Stream, ...] = () if follows.index == len(anatomy) - 1 else ("text",)
            units.append(UnitPlan(name=name, kind="text", span=span, streams=behind))
    return [unit for unit in units if not unit.behaviour.problem(unit, teacher)]


def _ffn(block: int, streams: tuple[Stream, ...], keep: float) -> UnitPlan:
    name = f"narrow_{block:02d}" if keep else f"{streams[0]}_ffn_{block:02d}"
    return UnitPlan(name=name, kind="ffn", span=(block, block), streams=streams, keep=keep)


_CHARGES = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Shares of a variant's error that a unit may be charged with for joining the library, which then trains all less."""

_SWEEPS = 2
"""Times that every variant is chosen at one charge; from the second on each knows what all others plug."""

_PATIENCE = 900.0
"""Seconds that all variants may be searched for: other ranks wait, and would be given up after an hour."""

_SHORTEST = 4.0
"""Seconds of one search, however many there are: in less, the solver may find no set at all."""

Sets = dict[str, tuple[str, ...]]
"""Variant -> the units that it plugs."""


def choose_sets(
    section: PlanSection, swaps: Swaps, budget: Budget, steps: int, kept: Mapping[str, tuple[str, ...]] | None = None
) -> Sets:
    """The units of every variant: the best of the sets that were measured and the one that the forecast likes best.

    Errors are those that are forecast for the end of training. That is `steps` for every unit; or, where the recipe has
    `plan.unit_steps`, as many as the library leaves room for. Then every unit more costs all others steps: units that
    are not in the library yet are charged for it, with each of `_CHARGES`, variants choosing from the smallest to the
    largest and the other way. Of the plans that come of it the one is taken whose errors are least when each is trained
    for as long as it would be.

    Args:
        steps: `distill.steps`.
        kept: variants that stay as they are: their units are in the library, and are trained, too.

    Raises:
        UserError: no set of units reaches a variant's share.
    """
    alone = np.array([np.diagonal(products) for products in swaps.products.values()])
    if broken := [
        unit.name for unit, errors in zip(swaps.units, alone.T, strict=True) if not np.isfinite(errors).all()
    ]:
        raise UserError(
            f"unit '{broken[0]}': what it puts out is not finite; take it out of the plan, or train it anew"
        )
    now = fitted(swaps, section.objective)

    def chooser(units: int) -> Chooser:
        return Chooser(section, swaps, budget, now, swaps.last_step(section.unit_steps, steps, units))

    if section.unit_steps is None:
        return chooser(len(swaps.units)).sets(0.0)
    plans, staying = [], dict(kept or {})
    for charge, smallest_first in product(_CHARGES, (True, False)):
        sets: Sets = {}
        size = len(swaps.units)
        for _ in range(_SWEEPS):
            sets = chooser(size).sets(charge, staying | sets, smallest_first)
            size = len(_used(staying | sets))
        plans.append((chooser(size).total(sets), sets))
    return min(plans, key=lambda plan: plan[0])[1]


class Chooser:
    """Chooses sets of units by what they will cost after so many steps.

    Args:
        now: the forecast for the units as they were measured.
        steps: of every unit, at the end of its training.
    """

    def __init__(self, section: PlanSection, swaps: Swaps, budget: Budget, now: Forecast, steps: float) -> None:
        self.section, self.swaps, self.budget, self.now = section, swaps, budget, now
        charges = 1 if section.unit_steps is None else 2 * 2 * len(_CHARGES) * _SWEEPS  # each also without a charge
        self._seconds = max(_SHORTEST, _PATIENCE / max(1, charges * len(section.variants)))
        self.then = now.grown(swaps.factors(steps))
        self.units = {unit.name: unit for unit in swaps.units}
        self.saved = dict(zip(self.units, self.now.saved(budget), strict=True))

    def value(self, names: tuple[str, ...]) -> float:
        """The objective of a set at the end of training: what was measured, if it was, after what is forecast of it."""
        units = [self.units[name] for name in names]
        measured, now, then = self.swaps.errors_of(names), self.now.of(units), self.then.of(units)
        assert now is not None, "the forecast knows its own units"
        assert then is not None, "the forecast knows its own units"
        if measured is None:
            return self.then.value(then)
        return self.then.value(measured) * self.then.value(then) / self.then.value(now)

    def total(self, sets: Sets) -> float:
        """The sum of the logarithms of all variants' objectives."""
        return sum(log(self.value(names)) for names in sets.values())

    def sets(
        self, charge: float, known: Mapping[str, tuple[str, ...]] | None = None, smallest_first: bool = True
    ) -> Sets:
        """The units of every variant, one after the other.

        Args:
            charge: for each unit that neither the variants chosen so far nor those of `known` plug.
            known: what was chosen before.
            smallest_first: whether the smallest model chooses its units first, or the largest.
        """
        found = dict(known or {})
        for name, share in sorted(self.section.variants.items(), key=lambda each: each[1], reverse=smallest_first):
            others = _used({variant: names for variant, names in found.items() if variant != name})
            found[name] = self._set(name, share * self.budget.total, {n: charge for n in self.units if n not in others})
        return {name: found[name] for name in self.section.variants}

    def _set(self, variant: str, goal: float, charges: Mapping[str, float]) -> tuple[str, ...]:
        gains = np.array(list(self.saved.values()))
        asked = np.array([charges.get(name, 0.0) for name in self.units])
        # As near to the goal as units allow; where nothing is that near, half a block is near enough.
        for slack in (self.budget.tolerance(gains), self.budget.slack):
            places = self.then.best(self.budget, goal - slack, goal + slack, asked, seconds=self._seconds)
            if places is not None:
                break
        else:
            _refuse(variant, self.section)
        rivals = [
            each.units for each in self.swaps.sets if abs(sum(map(self.saved.__getitem__, each.units)) - goal) <= slack
        ]
        names = tuple(self.swaps.units[place].name for place in places)
        return min((names, *rivals), key=lambda each: self.value(each) * (1 + sum(charges.get(n, 0.0) for n in each)))


def _used(sets: Mapping[str, tuple[str, ...]]) -> set[str]:
    return {name for names in sets.values() for name in names}


def kept_variants(section: PlanSection, library: Plan, others: Mapping[str, tuple[str, ...]]) -> Sets:
    """Those of the plan as it was that the recipe does not name, if the library has their units."""
    known = {unit.name for unit in library.units}
    return {name: units for name, units in others.items() if known.issuperset(units) and name not in section.variants}


def choose_again(
    section: PlanSection, swaps: Swaps, library: Plan, budget: Budget, steps: int, others: Mapping[str, tuple[str, ...]]
) -> Plan:
    """The plan of every variant's units in a measured library; units that no variant plugs are left out.

    Args:
        steps: `distill.steps`.
        others: variants of the plan as it was, see `kept_variants`.
    """
    kept = kept_variants(section, library, others)
    variants = kept | choose_sets(section, swaps, budget, steps, kept)
    used = _used(variants)
    units = tuple(unit for unit in library.units if unit.name in used)
    return library.model_copy(update={"units": units, "variants": variants})


def _refuse(name: str, section: PlanSection) -> NoReturn:
    raise UserError(
        f"plan.variants.{name}: no set of units gives up {section.variants[name]:.0%} of the blocks' {section.budget}; "
        "ask for another share, raise plan.max_span, use plan.rule: error, or name more plan.candidates"
    )
