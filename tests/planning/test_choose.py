"""Choosing: of all sets of spans that meet a variant's budget, the plan has the one of least error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from ppcl_ds.errors import UserError
from ppcl_ds.planning.budget import Budget, budget_of
from ppcl_ds.planning.choose import choose_again, choose_sets, make_plan
from ppcl_ds.planning.swaps import MeasuredSet, Swaps
from ppcl_ds.probing.report import Matrix, ProbeReport
from ppcl_ds.sections import Plan as PlanSection
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.kinds import parameters_saved
from ppcl_ds.units.plan import Plan, UnitPlan, conflict
from tests.calls import call_once
from tests.conftest import TEACHERS

Span = tuple[int, int]

RANDOM = settings(deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
"""No shrinking: it would take minutes, and a seed does not become any clearer by being small."""

CHANGES: dict[str, dict[str, Any]] = {"qwen": {"num_layers": 8}, "flux": {"num_single_layers": 4}, "sd3": {}}


@dataclass(frozen=True)
class Case:
    """A tiny teacher on disk, and what a reader of its source knows.

    Attributes:
        parameters: of each block.
        lists: block numbers of each list.
        closing: whether spans may close their list (not so in SD3: its last block has no text output).
    """

    teacher: Teacher
    parameters: np.ndarray
    lists: Sequence[range]
    closing: bool


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def make(family: str) -> Case:
        if family not in made:
            class_name, config = TEACHERS[family]
            torch.manual_seed(0)
            model = getattr(diffusers, class_name)(**config | CHANGES[family])
            folder: Path = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            teacher = Teacher(folder, run=call_once)
            blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
            sizes = np.array([sum(p.numel() for p in block.parameters()) for block in blocks], dtype=float)
            lists = [range(4), range(4, 8)] if family == "flux" else [range(len(blocks))]
            made[family] = Case(teacher, sizes, lists, family != "sd3")
        return made[family]

    return make


def report_of(case: Case, seed: int, spans: Sequence[Span] = ()) -> ProbeReport:
    random, size = np.random.default_rng(seed), len(case.parameters)
    error: Matrix = [[None] * size for _ in range(size)]
    for blocks in case.lists:
        for u in blocks:
            for v in range(u + 1, blocks[-1] + 1):
                error[u][v] = float(random.random() ** 3)
    return ProbeReport(teacher="", tokens={}, cka=error, error=error, spans=list(spans), unused=["text"])


def span_sets(case: Case, max_span: int) -> Iterator[list[Span]]:
    """Every set of spans that do not overlap: every way to cut each list into runs."""
    by_list = []
    for blocks in case.lists:
        cuts = product([False, True], repeat=len(blocks) - 1)
        bounds = [
            [blocks[0], *[b for b, cut in zip(blocks[1:], row, strict=True) if cut], blocks[-1] + 1] for row in cuts
        ]
        by_list.append([[(a, b - 1) for a, b in pairwise(row) if b - a > 1] for row in bounds])
    for parts in product(*by_list):
        spans = [span for part in parts for span in part]
        short = all(v - u < max_span for u, v in spans)
        if short and (case.closing or not any(v == len(case.parameters) - 1 for _, v in spans)):
            yield spans


def saved(case: Case, spans: Sequence[Span]) -> float:
    """Parameters given up: a span keeps as much as its first block."""
    return float(sum(case.parameters[u + 1 : v + 1].sum() for u, v in spans))


def total(report: ProbeReport, spans: Sequence[Span]) -> float:
    return sum(report.error[u][v] or 0.0 for u, v in spans)


def plan_of(section: PlanSection, report: ProbeReport, case: Case, seed: int = 0) -> Plan:
    return make_plan(section, seed, report, case.teacher, budget_of_case(section, case))


def budget_of_case(section: PlanSection, case: Case, swaps: Swaps | None = None) -> Budget:
    units = swaps.units if swaps else ()
    return budget_of(section, case.teacher, torch.float32, units, swaps)


def chosen(plan: Plan, variant: str) -> list[Span]:
    return [unit.span for unit in plan.units_of(variant)]


@pytest.mark.parametrize("family", TEACHERS)
@settings(RANDOM, max_examples=25)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.9), max_span=st.integers(2, 8))
def test_the_chosen_spans_are_the_best_of_all_that_meet_the_budget(
    case_of: Callable[[str], Case], family: str, seed: int, share: float, max_span: int
) -> None:
    case = case_of(family)
    report = report_of(case, seed)
    section = PlanSection(variants={"v": share}, max_span=max_span)
    goal, half = share * case.parameters.sum(), case.parameters.max() / 2
    distances = [(abs(saved(case, spans) - goal) / half, spans) for spans in span_sets(case, max_span)]
    assume(not any(0.99 < distance < 1.01 for distance, _ in distances))  # neither clearly in nor clearly out
    feasible = [spans for distance, spans in distances if spans and distance < 1]
    if not feasible:
        with pytest.raises(UserError, match=r"plan\.variants\.v"):
            plan_of(section, report, case)
        return
    spans = chosen(plan_of(section, report, case), "v")
    assert spans in feasible
    assert total(report, spans) == pytest.approx(min(total(report, other) for other in feasible), rel=1e-6)


@pytest.mark.parametrize("family", TEACHERS)
def test_all_variants_draw_on_one_library(case_of: Callable[[str], Case], family: str) -> None:
    case = case_of(family)
    section = PlanSection(variants={"large": 0.3, "twin": 0.3, "small": 0.5}, max_span=4)
    plan = plan_of(section, report_of(case, 1), case)
    spans = {variant: chosen(plan, variant) for variant in section.variants}
    assert spans["large"] == spans["twin"] != spans["small"]
    assert sorted({span for part in spans.values() for span in part}) == [unit.span for unit in plan.units]
    assert len({unit.name for unit in plan.units}) == len(plan.units)
    assert (plan.teacher, plan.blocks) == (case.teacher.class_name, len(case.parameters))


def test_units_are_trained_on_the_streams_that_somebody_reads(case_of: Callable[[str], Case]) -> None:
    case = case_of("qwen")
    report = report_of(case, 0, spans=[(0, 3), (4, 7)])
    section = PlanSection(variants={"v": 0.75}, rule="ppcl")
    streams = {unit.span: unit.streams for unit in plan_of(section, report, case).units}
    assert streams == {(0, 3): ("image", "text"), (4, 7): ("image",)}


@settings(RANDOM, max_examples=20)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.6))
def test_rule_ppcl_uses_the_reports_spans_only(case_of: Callable[[str], Case], seed: int, share: float) -> None:
    case = case_of("flux")
    spans = [(0, 1), (2, 3), (4, 6)]
    report = report_of(case, seed, spans)
    section = PlanSection(variants={"v": share}, rule="ppcl", max_span=2)  # the paper's spans may be longer
    goal, half = share * case.parameters.sum(), case.parameters.max() / 2
    subsets = [[s for s, keep in zip(spans, row, strict=True) if keep] for row in product([False, True], repeat=3)]
    distances = [(abs(saved(case, subset) - goal) / half, subset) for subset in subsets]
    assume(not any(0.99 < distance < 1.01 for distance, _ in distances))
    feasible = [subset for distance, subset in distances if distance < 1]
    assume(feasible)
    picked = chosen(plan_of(section, report, case), "v")
    assert picked in feasible
    assert total(report, picked) == pytest.approx(min(total(report, other) for other in feasible), rel=1e-6)


@pytest.mark.parametrize(
    ("share", "rule", "max_span", "spans"),
    [
        (0.95, "error", 8, []),  # one block of eight is 12.5 %
        (0.7, "error", 2, []),  # pairs give up half at most
        (0.5, "ppcl", 8, [(0, 1)]),
        (0.5, "ppcl", 8, []),
    ],
)
def test_a_budget_out_of_reach_is_refused_by_name(
    case_of: Callable[[str], Case], share: float, rule: Any, max_span: int, spans: list[Span]
) -> None:
    case = case_of("qwen")
    section = PlanSection(variants={"tiny one": share}, rule=rule, max_span=max_span)
    with pytest.raises(UserError, match=r"plan\.variants\.tiny one") as refused:
        plan_of(section, report_of(case, 0, spans), case)
    assert f"{share:.0%}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_candidates_join_the_library_without_a_variant(case_of: Callable[[str], Case]) -> None:
    case = case_of("qwen")
    report = report_of(case, 3)
    alone = plan_of(PlanSection(variants={"v": 0.5}), report, case)
    wider = plan_of(PlanSection(variants={"v": 0.5}, candidates=("uniform", "random")), report, case)
    assert wider.variants == alone.variants
    uniform = {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert {unit.span for unit in wider.units} > {unit.span for unit in alone.units} | uniform


def test_a_given_plan_is_taken_as_it_is_and_chosen_from(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("qwen")
    units = tuple(UnitPlan(name=f"own {u}", span=(u, v), streams=("image",)) for u, v in [(0, 1), (2, 4), (5, 6)])
    own = Plan(teacher=case.teacher.class_name, blocks=8, units=units, variants={"published": ("own 2",)})
    own.save(tmp_path / "plan.yaml")
    section = PlanSection(rule="given", given=tmp_path / "plan.yaml", variants={"half": 0.5})
    plan = plan_of(section, report_of(case, 0), case)
    assert plan.units == units
    assert plan.variants == {"published": ("own 2",), "half": ("own 0", "own 2", "own 5")}


@pytest.mark.parametrize("changes", [{"rule": "given"}, {"candidates": ["given"]}, {"variants": {}}])
def test_a_section_that_says_too_little_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"missing|empty"):
        PlanSection(**{"variants": {"v": 0.5}} | changes)


def test_memory_counts_bytes_and_latency_seconds(case_of: Callable[[str], Case]) -> None:
    case = case_of("flux")
    memory = PlanSection(variants={"v": 0.5}, budget="memory")
    halves = budget_of(memory, case.teacher, torch.bfloat16)
    assert (halves.blocks == 2 * case.parameters).all()
    latency = PlanSection(variants={"v": 0.5}, budget="latency")
    seconds = [0.1 * block for block in range(8)]
    swaps = Swaps(checkpoint="", units=(), products={}, sets=[], seconds=seconds)
    assert budget_of_case(latency, case, swaps).blocks.tolist() == seconds
    assert (budget_of_case(latency, case).blocks == case.parameters).all()


def measured_library(case: Case, errors: dict[Span, float], sets: dict[tuple[Span, ...], float]) -> Swaps:
    units = tuple(UnitPlan(name=str(span), span=span, streams=("image",)) for span in errors)
    measured = [MeasuredSet(units=tuple(map(str, spans)), errors={"velocity": e}) for spans, e in sets.items()]
    products = {"velocity": np.diag(list(errors.values())).tolist()}
    return Swaps(checkpoint="", units=units, products=products, sets=measured, seconds=[1.0, *[0.1] * 7])


def test_variants_are_chosen_anew_by_what_units_cost(case_of: Callable[[str], Case]) -> None:
    case = case_of("qwen")
    swaps = measured_library(case, {(0, 1): 0.9, (2, 4): 0.1, (5, 6): 0.2, (5, 7): 0.8}, {})
    library = Plan(teacher=case.teacher.class_name, blocks=8, units=swaps.units, variants={})
    section = PlanSection(variants={"v": 3 / 8, "w": 2 / 8})
    plan = choose_again(
        section, swaps, library, budget_of_case(section, case, swaps), 1, {"mine": ("(0, 1)",), "v": ()}
    )
    assert chosen(plan, "v") == [(2, 4), (5, 6)]
    assert chosen(plan, "w") == [(2, 4)]
    assert plan.variants["mine"] == ("(0, 1)",), "written by hand, and not the recipe's to change"
    assert [unit.span for unit in plan.units] == [(0, 1), (2, 4), (5, 6)]  # no variant wants (5, 7)


def test_a_set_that_was_measured_to_be_better_is_preferred(case_of: Callable[[str], Case]) -> None:
    case = case_of("qwen")
    errors = {(0, 1): 0.3, (2, 4): 0.1, (5, 6): 0.2}
    swaps = measured_library(case, errors, {((2, 4), (5, 6)): 0.5, ((0, 1), (2, 4)): 0.35})
    section = PlanSection(variants={"v": 3 / 8})
    names = choose_sets(section, swaps, budget_of_case(section, case, swaps), 1)["v"]
    assert set(names) == {"(0, 1)", "(2, 4)"}


def test_blocks_stay_lose_parts_or_go_with_a_span_whatever_costs_least(case_of: Callable[[str], Case]) -> None:
    case = case_of("qwen")
    width = (
        UnitPlan(name="group", kind="text", span=(2, 5), streams=("text",)),
        UnitPlan(name="line", kind="ffn", span=(6, 6), streams=("image", "text")),
        UnitPlan(name="thin", kind="ffn", span=(7, 7), streams=("image",), keep=0.25),
    )
    depth = measured_library(case, {(0, 1): 0.5, (2, 4): 0.3, (5, 6): 0.6}, {})
    errors = [0.5, 0.3, 0.6, 0.05, 0.02, 0.01]
    swaps = depth.model_copy(
        update={"units": (*depth.units, *width), "products": {"velocity": np.diag(errors).tolist()}}
    )
    section = PlanSection(variants={"v": 0.2})
    budget = budget_of_case(section, case, swaps)
    saved = {unit.name: parameters_saved(unit, case.teacher) for unit in swaps.units}
    assert budget.parts == {name: saved[name] for name in ("group", "line", "thin")}

    def total(names: tuple[str, ...]) -> float:
        return sum(errors[[unit.name for unit in swaps.units].index(name)] for name in names)

    names = choose_sets(section, swaps, budget, 1)["v"]
    units = [unit for unit in swaps.units if unit.name in names]
    assert not any(conflict(a, b) for a, b in combinations(units, 2))
    sets = [names for size in range(1, 5) for names in combinations([unit.name for unit in swaps.units], size)]
    library = {unit.name: unit for unit in swaps.units}
    feasible = [
        each
        for each in sets
        if not any(conflict(library[a], library[b]) for a, b in combinations(each, 2))
        and abs(sum(saved[name] for name in each) - 0.2 * budget.total) <= 0.5 * min(saved.values())
    ]
    assert total(names) == pytest.approx(min(map(total, feasible)))
    assert "group" in names, "cheaper than any span"


def test_a_budget_of_time_spends_seconds(case_of: Callable[[str], Case]) -> None:
    case = case_of("qwen")
    swaps = measured_library(case, {(0, 1): 0.01, (2, 3): 0.5, (6, 7): 0.3}, {})
    swaps = swaps.model_copy(update={"seconds": [0.1, 0.1, 0.1, 1.0, 0.1, 0.1, 0.1, 0.1]})
    section = PlanSection(variants={"v": 0.6}, budget="latency")
    assert choose_sets(section, swaps, budget_of_case(section, case, swaps), 1)["v"] == ("(2, 3)",)
