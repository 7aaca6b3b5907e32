"""A user's fault is one clear line and exit code 2, before anything starts, from every rank at once."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ppcl_ds.distill.distill import check
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checks import write_start
from ppcl_ds.units.plan import Plan, UnitPlan, load_plan
from tests.conftest import command, said
from tests.ranks import afresh, environment, fresh, ranks_of, torchrun

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


def start(path: Path) -> None:
    """As if the recipe had been trained."""
    recipe = load_recipe(path)
    recipe.distillation.checkpoints.mkdir(parents=True)
    (recipe.distillation.checkpoints / "latest").write_text("step-000001")
    teacher = open_teacher(recipe)
    write_start(recipe, recipe.distillation, load_plan(recipe.plan_file, teacher))


def other_units(path: Path) -> None:
    start(path)
    write_plan(path, (0, 1), (3, 4))


def other_optimizer(path: Path) -> None:
    start(path)
    edit(path, lambda recipe: recipe["distill"]["optimizer"].update(lr=0.5))


def other_shards(path: Path) -> None:
    start(path)
    index = path.parent / "shards" / "encoded" / "index.json"
    changed = json.loads(index.read_text())
    for entry in changed["shards"]:
        entry["sha256"] = "0" * 64
    index.write_text(json.dumps(changed))


def gone_checkpoint(path: Path) -> None:
    start(path)


def clipping(path: Path) -> None:
    (path.parent / "students.json").write_text('{"gradient_clipping": 1.0}')
    edit(path, lambda recipe: recipe.update(deepspeed={"students": "{run}/students.json"}))


def offloading(path: Path) -> None:
    (path.parent / "students.json").write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    edit(path, lambda recipe: recipe.update(deepspeed={"students": "{run}/students.json"}))


def uneven_copies(path: Path) -> None:
    edit(path, lambda recipe: recipe["teacher"].update(ranks_per_copy=3))


def other_component(path: Path) -> None:
    edit(path, lambda recipe: recipe["teacher"].update(component="transformer_2"))


def other_options(path: Path) -> None:
    edit(path, lambda recipe: recipe["teacher"].update(options={"num_steps": 3}))


def no_heldout(path: Path) -> None:
    next((path.parent / "shards" / "encoded").glob("heldout-*.tar")).unlink()
    edit(path, lambda recipe: recipe["distill"].update(sample_every=1))


def no_plan(path: Path) -> None:
    load_recipe(path).plan_file.unlink()


FAULTS: list[tuple[Change, list[str]]] = [
    (wrong_key, ["unknown key 'distill.micro_bach'", "did you mean 'micro_batch'?"]),
    (wrong_value, ["distill.steps", "whole number"]),
    (lost_shard, ["train-", "missing"]),
    (no_teacher, ["images", "config.json"]),
    (overlapping_spans, ["variant 'only'", "[0, 2]", "[2, 4]", "overlap"]),
    (too_many_stages, ["topology.stages is 4", "2 units"]),
    (odd_micro_batches, ["micro_batches_per_step", "multiple"]),
    (other_units, ["trained with other units", "plan.yaml"]),
    (other_optimizer, ["distill.optimizer.lr", "move", "train anew"]),
    (other_shards, ["trained on other shards", "train anew"]),
    (gone_checkpoint, ["latest names 'step-000001'", "gone"]),
    (clipping, ["students.json", "gradient_clipping must not be set", "distill.optimizer.clip_norm"]),
    (offloading, ["students.json", "offload_optimizer must not be set", "distill.optimizer.offload"]),
    (uneven_copies, ["teacher.ranks_per_copy is 3", "2 processes"]),
    (other_component, ["teacher", "transformer_2"]),
    (other_options, ["teacher.options", "no argument 'num_steps'"]),
    (no_heldout, ["heldout-", "missing"]),
    (no_plan, ["plan.yaml", "ppcl plan"]),
]


@pytest.fixture
def ready(new_run: Callable[..., Path]) -> Path:
    """A run that could be distilled."""
    path = new_run("qwen")
    write_plan(path, (0, 1), (2, 4))
    return path


@pytest.mark.parametrize(("break_it", "words"), FAULTS, ids=[change.__name__ for change, _ in FAULTS])
def test_a_fault_is_named_before_anything_starts(ready: Path, break_it: Change, words: list[str]) -> None:
    break_it(ready)
    with pytest.raises(UserError) as fault:
        check(load_recipe(ready))
    assert len(str(fault.value).splitlines()) == 1
    for word in words:
        assert word in str(fault.value)


def test_the_command_says_it_in_one_line_and_exits_with_2(ready: Path) -> None:
    overlapping_spans(ready)
    done = afresh("ppcl_ds.cli", "distill", ready)
    assert done.returncode == 2
    assert done.stdout == "starting 2 processes\n"
    [line] = said(done.stderr).splitlines()
    assert line.startswith("error: ")


@pytest.mark.launcher
def test_every_rank_reports_the_fault_and_none_hangs(ready: Path) -> None:
    lost_shard(ready)
    done = torchrun("ppcl_ds.cli", "distill", ready, timeout=120)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 2
    assert "exitcode  : 2" in done.stderr
    assert "new message format" not in done.stderr, "torchrun reads the last words of a rank in its own format"


def test_a_number_of_ranks_that_is_not_the_recipes_is_a_fault(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=r"1 processes were started, but topology\.stages x topology\.replicas is 2"):
        check(load_recipe(ready))


def cut_shard(path: Path) -> None:
    shard = next((path.parent / "shards" / "encoded").glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])


def test_a_dry_run_checks_every_shard_and_trains_nothing(ready: Path) -> None:
    printed = command("distill", ready, "--dry-run")
    assert "fits: " in printed
    assert "shards: 3 with 48 samples" in printed
    cut_shard(ready)
    printed = command("distill", ready, "--dry-run", code=2)
    assert "train-" in printed
    assert "missing or cut short" in printed
    assert not load_recipe(ready).distillation.checkpoints.exists()
    assert not load_recipe(ready).distillation.plan.exists()


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"recipe {tmp_path / 'none.yaml'}" in command("probe", tmp_path / "none.yaml", code=2)


def test_an_unknown_variant_is_refused_before_anything_is_written(ready: Path) -> None:
    printed = command("consolidate", ready, "--variant", "huge", code=2)
    assert "variant 'huge'" in printed
    assert "only" in printed
    assert not (ready.parent / "pruned").exists()


def test_evaluating_before_consolidating_says_what_to_run(ready: Path) -> None:
    assert "ppcl consolidate" in command("evaluate", ready, code=2)


@pytest.mark.launcher
def test_a_stopped_command_leaves_no_rank_behind(ready: Path) -> None:
    edit(ready, lambda recipe: recipe["distill"].update(steps=100000))
    distilling = fresh("ppcl_ds.cli", "distill", ready)
    with subprocess.Popen(distilling, stdout=subprocess.PIPE, env=environment()) as run:
        assert run.stdout is not None
        for line in run.stdout:  # the first progress line: the ranks are training
            if b"distill: " in line:
                break
        assert ranks_of(ready)
        run.terminate()
        run.wait(timeout=60)
    deadline = time.monotonic() + 40
    while ranks_of(ready) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not ranks_of(ready)
