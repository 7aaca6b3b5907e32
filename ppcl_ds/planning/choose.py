"""From a probe report, or from a measured library, to a plan: which units every variant plugs."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from ppcl_ds.errors import UserError
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.planning.forecast import fitted
from ppcl_ds.planning.plan import Plan, UnitPlan, allowed_spans, load_plan
from ppcl_ds.planning.programme import cheapest
from ppcl_ds.planning.rules import Ground, Span, spans_by
from ppcl_ds.planning.swaps import Swaps
from ppcl_ds.probing.report import ProbeReport
from ppcl_ds.sections import Plan as PlanSection

Sizes = NDArray[np.float64]
"""(M,) what each block weighs in the budget."""


def block_sizes(
    section: PlanSection, files: ModelFiles, anatomy: Anatomy, dtype: torch.dtype, seconds: list[float] | None = None
) -> Sizes:
    """What each block weighs in the recipe's budget, (M,): parameters, bytes or seconds.

    Args:
        dtype: number format of the run.
        seconds: of each block, once that is measured; until then parameters stand for it.
    """
    if section.budget == "latency" and seconds:
        return np.array(seconds)
    weights = dict(files.empty_model().named_parameters())
    size_of = {
        key: weight.numel() * (files.runs_as(key, dtype).itemsize if section.budget == "memory" else 1)
        for key, weight in weights.items()
    }
    return np.array(
        [sum(size for key, size in size_of.items() if key.startswith(f"{block.key}.")) for block in anatomy.blocks],
        dtype=float,
    )


def make_plan(
    section: PlanSection, seed: int, report: ProbeReport, files: ModelFiles, anatomy: Anatomy, sizes: Sizes
) -> Plan:
    """Choose spans for every variant by the recipe's rule, and gather them, with all candidates, into one library.

    Args:
        seed: of rule `random`.

    Raises:
        UserError: no set of spans reaches a variant's share.
    """
    given = load_plan(section.given, files, anatomy) if section.given else None
    ground = _ground(section, seed, report, files, anatomy, sizes, given)
    rules = dict.fromkeys((section.rule, *section.candidates))
    found = {rule: {name: spans_by(rule, ground, share) for name, share in section.variants.items()} for rule in rules}
    for name, spans in found[section.rule].items():
        if not spans:
            _refuse(name, section)
    units = {unit.span: unit for unit in given.units} if given and "given" in rules else {}
    for span in sorted({span for sets in found.values() for spans in sets.values() for span in spans or ()}):
        units.setdefault(span, _unit(span, report, anatomy))
    variants = dict(given.variants) if given and section.rule == "given" else {}
    variants |= {name: tuple(units[s].name for s in spans or ()) for name, spans in found[section.rule].items()}
    library = tuple(units[span] for span in sorted(units))
    return Plan(teacher=files.class_name, blocks=len(anatomy), units=library, variants=variants)


def _ground(
    section: PlanSection,
    seed: int,
    report: ProbeReport,
    files: ModelFiles,
    anatomy: Anatomy,
    sizes: Sizes,
    given: Plan | None,
) -> Ground:
    lists: dict[str, list[int]] = {}
    for block in anatomy.blocks:
        lists.setdefault(block.list_name, []).append(block.index)
    return Ground(
        report=report,
        sizes=sizes,
        lists=list(lists.values()),
        allowed=allowed_spans(files, anatomy),
        max_span=section.max_span,
        seed=seed,
        given=[unit.span for unit in given.units] if given else [],
    )


def _unit(span: Span, report: ProbeReport, anatomy: Anatomy) -> UnitPlan:
    name = f"blocks_{span[0]:02d}_{span[1]:02d}"
    return UnitPlan(name=name, span=span, streams=report.used_streams(anatomy.blocks[span[1]]))


def choose_sets(section: PlanSection, swaps: Swaps, sizes: Sizes) -> dict[str, tuple[str, ...]]:
    """The units of every variant: the best of the sets that were measured and the one that the forecast likes best.

    Raises:
        UserError: no set of units reaches a variant's share.
    """
    forecast = fitted(swaps)
    candidates = forecast.candidates(sizes)
    saved = {unit.name: gain for unit, gain in zip(swaps.units, candidates.saved, strict=True)}
    slack, chosen = 0.501 * sizes.max(), {}
    for name, share in section.variants.items():
        goal = share * sizes.sum()
        places = cheapest(candidates, goal - slack, goal + slack)
        if places is None:
            _refuse(name, section)
        units = [swaps.units[place] for place in places]
        names = tuple(unit.name for unit in units)
        measured = swaps.error_of(names)
        error = forecast.of(units) if measured is None else measured
        assert error is not None, "the forecast knows its own units"
        rivals = [each for each in swaps.sets if abs(sum(saved[unit] for unit in each.units) - goal) <= slack]
        best = min(rivals, key=lambda each: each.error, default=None)
        chosen[name] = best.units if best and best.error < error else names
    return chosen


def choose_again(section: PlanSection, swaps: Swaps, library: Plan, sizes: Sizes) -> Plan:
    """The plan of every variant's units in a measured library; units that no variant plugs are left out."""
    variants = choose_sets(section, swaps, sizes)
    used = {name for names in variants.values() for name in names}
    units = tuple(unit for unit in library.units if unit.name in used)
    return library.model_copy(update={"units": units, "variants": variants})


def _refuse(name: str, section: PlanSection) -> NoReturn:
    raise UserError(
        f"plan.variants.{name}: no set of units gives up {section.variants[name]:.0%} of the blocks' {section.budget}; "
        "ask for another share, raise plan.max_span, use plan.rule: error, or name more plan.candidates"
    )
