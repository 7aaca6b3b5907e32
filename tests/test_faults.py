"""A user's fault is one clear line and exit code 2, before anything starts, from every rank at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ppcl_ds.planning.plan import Plan, UnitPlan
from ppcl_ds.recipe import load_recipe
from tests.conftest import command

Change = Callable[[Path], None]


def edit(path: Path, change: Callable[[dict], None]) -> None:
    recipe = yaml.safe_load(path.read_text())
    change(recipe)
    path.write_text(yaml.safe_dump(recipe))


def write_plan(path: Path, *spans: tuple[int, int]) -> None:
    units = tuple(UnitPlan(name=f"unit_{u}_{v}", span=(u, v), streams=("image", "text")) for u, v in spans)
    names = tuple(unit.name for unit in units)
    plan = Plan(teacher="QwenImageTransformer2DModel", blocks=6, units=units, variants={"only": names})
    plan.save(load_recipe(path).plan_file)


def wrong_key(path: Path) -> None:
    edit(path, lambda recipe: recipe["distill"].update(micro_bach=4))


def wrong_value(path: Path) -> None:
    edit(path, lambda recipe: recipe["distill"].update(steps="many"))


def lost_shard(path: Path) -> None:
    next((path.parent / "shards" / "encoded").glob("train-*.tar")).unlink()


def no_teacher(path: Path) -> None:
    edit(path, lambda recipe: recipe["teacher"].update(path="{run}/images"))


def overlapping_spans(path: Path) -> None:
    write_plan(path, (0, 2), (2, 4))


def too_many_stages(path: Path) -> None:
    edit(path, lambda recipe: recipe.update(topology={"stages": 4, "replicas": 1}))


def odd_micro_batches(path: Path) -> None:
    edit(path, lambda recipe: recipe.update(topology={"stages": 1, "replicas": 3}))


def other_units(path: Path) -> None:
    recipe = load_recipe(path)
    recipe.checkpoints.mkdir(parents=True)
    (recipe.checkpoints / "latest").write_text("step-000001")
    recipe.plan_file.rename(recipe.trained_plan)
    write_plan(path, (0, 1), (3, 4))


def no_plan(path: Path) -> None:
    load_recipe(path).plan_file.unlink()


FAULTS: list[tuple[Change, list[str]]] = [
    (wrong_key, ["unknown key 'distill.micro_bach'", "did you mean 'micro_batch'?"]),
    (wrong_value, ["distill.steps", "integer"]),
    (lost_shard, ["train-", "missing"]),
    (no_teacher, ["images", "config.json"]),
    (overlapping_spans, ["variant 'only'", "[0, 2]", "[2, 4]", "overlap"]),
    (too_many_stages, ["topology.stages is 4", "2 units"]),
    (odd_micro_batches, ["micro_batches_per_step", "multiple"]),
    (other_units, ["trained with other units", "plan.yaml"]),
    (no_plan, ["plan.yaml", "ppcl plan"]),
]


@pytest.fixture
def ready(new_run: Callable[..., Path]) -> Path:
    """A run that could be distilled."""
    path = new_run("qwen")
    write_plan(path, (0, 1), (2, 4))
    return path


@pytest.mark.parametrize(("break_it", "words"), FAULTS, ids=[change.__name__ for change, _ in FAULTS])
def test_a_fault_is_one_line_and_exit_code_2(ready: Path, break_it: Change, words: list[str]) -> None:
    break_it(ready)
    printed = command("distill", ready, code=2).strip()
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1
    for word in words:
        assert word in printed


def test_every_rank_reports_the_fault_and_none_hangs(ready: Path) -> None:
    lost_shard(ready)
    began = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "ppcl_ds.cli",
            "distill",
            str(ready),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 2
    assert "exitcode  : 2" in done.stderr
    assert time.monotonic() - began < 60


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"recipe {tmp_path / 'none.yaml'}" in command("probe", tmp_path / "none.yaml", code=2)


def test_an_unknown_variant_is_refused_before_anything_is_written(ready: Path) -> None:
    printed = command("consolidate", ready, "--variant", "huge", code=2)
    assert "variant 'huge'" in printed
    assert "only" in printed
    assert not (ready.parent / "pruned").exists()


def test_evaluating_before_consolidating_says_what_to_run(ready: Path) -> None:
    assert "ppcl consolidate" in command("evaluate", ready, code=2)
