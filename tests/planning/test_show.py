"""A plan for people: its variants in a table, and where they lie between error and size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppcl_ds.atomic import atomic_write
from ppcl_ds.planning.budget import budget_of
from ppcl_ds.planning.error_model import probed
from ppcl_ds.planning.planner import show
from ppcl_ds.planning.show import front, read_outlook
from ppcl_ds.probing.report import ProbeReport
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.units.plan import Plan, UnitPlan
from tests.conftest import command

UNITS = (
    UnitPlan(name="early", span=(0, 2), streams=("image", "text")),
    UnitPlan(name="late", span=(3, 4), streams=("image", "text")),
    UnitPlan(name="line", kind="ffn", span=(5, 5), streams=("image",)),
)
PLAN = Plan(
    teacher="QwenImageTransformer2DModel",
    blocks=6,
    units=UNITS,
    variants={"small [a]": ("early", "late"), "wide": ("late", "line"), "whole": ()},
)


@pytest.fixture
def probed_run(new_run: Callable[..., Path]) -> tuple[Path, Recipe]:
    """A run with a plan, and a probe report in which longer and later spans cost more."""
    path = new_run("qwen")
    recipe = load_recipe(path)
    PLAN.save(recipe.plan_file)
    error = [[0.1 * (v - u) + 0.01 * v if u < v else None for v in range(6)] for u in range(6)]
    report = ProbeReport(teacher=PLAN.teacher, tokens={}, cka=error, error=error, spans=[], unused=["text"])
    atomic_write(recipe.probe_folder / "report.json", report.model_dump_json())
    return path, recipe


def test_the_table_says_what_is_left_and_what_it_is_expected_to_cost(
    probed_run: tuple[Path, Recipe], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recipe = probed_run
    monkeypatch.setenv("COLUMNS", "160")  # of the terminal
    show(recipe)
    lines = {line.strip().split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    block = open_teacher(recipe).blocks[0].parameters
    assert f"{3 * block:,} (-50%)" in lines["small [a]"]
    assert "3 of 6" in lines["small [a]"]
    assert "[0,2] [3,4]" in lines["small [a]"]
    assert f"{0.22 + 0.14:.4g}" in lines["small [a]"]
    linear, ffn = 32 * 32 + 32, 2 * 32 * 128 + 128 + 32
    assert f"{5 * block - ffn + linear:,}" in lines["wide"]
    assert "image ffn[5]" in lines["wide"]
    assert "not known" in lines["wide"], "no probe says what a feed-forward costs"
    assert f"{6 * block:,} (+0%)" in lines["whole"]
    outlook = read_outlook(recipe.run / "plan")
    assert outlook is not None
    assert outlook.plan == PLAN
    assert [(line.name, line.blocks, line.errors) for line in outlook.lines] == [
        ("small [a]", 3, {"error": pytest.approx(0.36)}),
        ("wide", 5, None),
        ("whole", 6, {"error": 0}),
    ]
    assert len(outlook.points) == 5


def test_the_front_holds_sets_that_no_smaller_one_beats(probed_run: tuple[Path, Recipe]) -> None:
    _, recipe = probed_run
    teacher = open_teacher(recipe)
    report = ProbeReport.model_validate_json((recipe.probe_folder / "report.json").read_text())
    forecast = probed(report, teacher)
    points = front(forecast, budget_of(recipe.plan, teacher, torch.float32))
    assert [point.left for point in points] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [point.errors["error"] for point in points] == sorted(point.errors["error"] for point in points)
    assert points[0].name == "[0,1]"
    assert points[-1].errors["error"] == pytest.approx(0.55)  # one block for all


def test_everything_that_is_wrong_with_an_edited_plan_is_said_at_once(probed_run: tuple[Path, Recipe]) -> None:
    path, recipe = probed_run
    text = recipe.plan_file.read_text()
    recipe.plan_file.write_text(text.replace("span: [3, 4]", "span: [2, 4]").replace("wide: [late", "wide: [lost"))
    printed = command("plan", path, "--check", code=2).strip().splitlines()
    assert len(printed) == 2
    assert "spans [0, 2] of 'early' and [2, 4] of 'late' overlap" in printed[0]
    assert "'lost'" in printed[1]
    recipe.plan_file.write_text(text)
    assert "in order" in command("plan", path, "--check")
