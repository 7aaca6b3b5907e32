"""Choosing the spans of every variant under its budget, as an integer programme."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ppcl_ds.errors import UserError
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.planning.plan import Plan, UnitPlan, allowed_spans
from ppcl_ds.probing.report import ProbeReport
from ppcl_ds.sections import Plan as PlanSection

Span = tuple[int, int]


def make_plan(section: PlanSection, report: ProbeReport, files: ModelFiles, anatomy: Anatomy) -> Plan:
    """Choose spans for every variant and gather them into one library.

    Raises:
        UserError: no set of spans reaches a variant's share.
    """
    candidates = _candidates(section, report, files, anatomy)
    chosen = {name: _choose(name, share, candidates, anatomy) for name, share in section.variants.items()}
    spans = sorted({span for spans in chosen.values() for span in spans})
    units = tuple(
        UnitPlan(name=_name(span), span=span, streams=report.used_streams(anatomy.blocks[span[1]])) for span in spans
    )
    variants = {name: tuple(_name(span) for span in spans) for name, spans in chosen.items()}
    return Plan(teacher=files.class_name, blocks=len(anatomy), units=units, variants=variants)


def _name(span: Span) -> str:
    return f"blocks_{span[0]:02d}_{span[1]:02d}"


def _candidates(section: PlanSection, report: ProbeReport, files: ModelFiles, anatomy: Anatomy) -> dict[Span, float]:
    """Spans that may be chosen, with the error each is expected to add."""
    allowed = allowed_spans(files, anatomy)
    if section.rule == "ppcl":
        spans = [span for span in report.spans if span in allowed]
    else:
        spans = [(u, v) for u, v in allowed if v - u < section.max_span]
    errors = {(u, v): report.error[u][v] for u, v in spans}
    return {span: error for span, error in errors.items() if error is not None}


def _choose(name: str, share: float, candidates: Mapping[Span, float], anatomy: Anatomy) -> list[Span]:
    """The non-overlapping spans of least total error that give up `share` of the block parameters.

    One binary variable a span; every block is in at most one chosen span; the parameters given up lie within half a
    block of the goal, as blocks cannot be split.
    """
    spans = sorted(candidates)
    parameters = np.array([block.parameters for block in anatomy.blocks], dtype=float)
    saved = np.array([parameters[u + 1 : v + 1].sum() for u, v in spans])
    covers = np.array([[u <= block <= v for u, v in spans] for block in range(len(anatomy))], dtype=float)
    goal, slack = share * parameters.sum(), 0.501 * parameters.max()
    if not spans or saved @ np.ones(len(spans)) < goal - slack:
        _refuse(name, share)
    # Scaled to blocks, and errors to large numbers: the solver's tolerances are absolute.
    size = parameters.max()
    errors = np.array([candidates[span] for span in spans])
    solution = milp(
        c=errors * (1e4 / errors.max()),
        integrality=np.ones(len(spans)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
        constraints=[
            LinearConstraint(covers, -np.inf, 1),
            LinearConstraint(np.ones((1, len(spans))), 1, np.inf),  # a variant that replaces nothing is the teacher
            LinearConstraint(saved[None] / size, (goal - slack) / size, (goal + slack) / size),
        ],
    )
    if solution.x is None:
        _refuse(name, share)
    return [span for span, picked in zip(spans, solution.x, strict=True) if picked > 0.5]


def _refuse(name: str, share: float) -> None:
    raise UserError(
        f"plan.variants.{name}: no set of spans gives up {share:.0%} of the block parameters; "
        "ask for another share, raise plan.max_span, or use plan.rule: error"
    )
