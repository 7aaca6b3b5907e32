"""Whatever stops a run, it goes on from its newest whole checkpoint as if nothing had happened, and nobody hangs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from torch import Tensor

from ppcl_ds.recipe import load_recipe
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.watch.tensorboard import read_scalars
from tests.conftest import command, make_recipe
from tests.plans import ten_spans
from tests.ranks import Done, environment, fresh, ranks_of, run

PLAN = ten_spans()
STEPS = 8
SETTINGS = {"steps": STEPS, "checkpoint_every": 2, "keep_checkpoints": 2, "timeout": 20}
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]
DEATHS = {"0:forward:37": 2, "1:exchange:11": 4, "0:checkpoint:1": 4}
"""Who dies where and when (see `dying.py`; counted from each start) -> the newest whole checkpoint it leaves behind."""


def new(new_run: Callable[..., Path], **changes: object) -> Path:
    path = new_run("qwen", distill=SETTINGS | changes)
    PLAN.save(load_recipe(path).plan_file)
    return path


def outcome(path: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, dict[str, Tensor]]]:
    """Losses of every unit and step, and the final weights."""
    recipe = load_recipe(path)
    losses = {name: points for name, points in read_scalars(recipe.distillation.board).items() if "/loss/" in name}
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    assert checkpoint.contents.step == STEPS
    return losses, {unit.name: checkpoint.unit(unit.name) for unit in PLAN.units}


DEATHS_ON_TRAJECTORIES = {"0:forward:20": 2, "1:exchange:5": 4}
"""The teacher is asked at every second step."""
TRAJECTORIES: dict[str, object] = {
    "trajectories": {"steps": [2, 4], "guidance": [1.5, 3.0]},
    "replay": {"uses": 2, "ring": 3},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, prepared: Callable[[str], Path]) -> Path:
    """A run of the same recipe that nothing stopped."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    shutil.copytree(prepared("qwen"), run)
    recipe = make_recipe("qwen", run)
    recipe["distill"] |= SETTINGS
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    PLAN.save(load_recipe(path).plan_file)
    command("distill", path)
    return path


def killed(path: Path, death: str, newest: int) -> None:
    """Run until a rank dies; the checkpoint that it leaves behind is the one that is expected."""
    began = time.monotonic()
    done = run_dying(path, death)
    assert done.returncode != 0
    assert "was ended by SIGKILL" in done.stderr, done.stderr
    assert time.monotonic() - began < 90
    assert newest_checkpoint(load_recipe(path).distillation.checkpoints).contents.step == newest


def expect_same(path: Path, other: Path) -> None:
    (losses, weights), (expected_losses, expected_weights) = outcome(path), outcome(other)
    assert losses == expected_losses
    assert all([step for step, _ in points] == list(range(1, STEPS + 1)) for points in losses.values())
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)


def test_a_run_whose_ranks_are_killed_three_times_ends_as_one_that_never_was(
    new_run: Callable[..., Path], uninterrupted: Path
) -> None:
    path = new(new_run)
    folder = load_recipe(path).distillation.checkpoints
    for death, newest in DEATHS.items():
        killed(path, death, newest)
    assert (folder / "step-000006.partial").exists()  # what the last one was killed at
    command("distill", path)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000006", "step-000008"]
    expect_same(path, uninterrupted)


def test_pictures_in_the_making_and_the_ring_go_on_as_if_no_rank_had_been_killed(new_run: Callable[..., Path]) -> None:
    path = new(new_run, **TRAJECTORIES)
    for death, newest in DEATHS_ON_TRAJECTORIES.items():
        killed(path, death, newest)
    command("distill", path)
    other = new(new_run, **TRAJECTORIES)
    command("distill", other)
    expect_same(path, other)


def test_the_training_goes_on_while_a_checkpoint_is_written(new_run: Callable[..., Path], uninterrupted: Path) -> None:
    """Rank 1's first file is not begun before it has trained on; nothing of that is in it."""
    path = new(new_run)
    done = run_dying(path, "1:held:1")
    assert done.returncode == 0, done.stdout + done.stderr
    expect_same(path, uninterrupted)


def test_a_checkpoint_may_take_longer_than_the_time_out(new_run: Callable[..., Path]) -> None:
    """Its bytes grow, on one rank; the others wait for it at the end."""
    path = new(new_run, steps=2, timeout=4)
    done = run_dying(path, "1:slow:1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert newest_checkpoint(load_recipe(path).distillation.checkpoints).contents.step == 2


@pytest.mark.launcher
def test_a_full_disk_costs_checkpoints_but_no_work(new_run: Callable[..., Path], uninterrupted: Path) -> None:
    """On a disk that somebody fills after the first checkpoint; then on another one."""
    path = new(new_run)
    recipe = load_recipe(path)
    one = next(load_recipe(uninterrupted).distillation.checkpoints.glob("step-*"))
    size = int(3.5 * sum(file.stat().st_size for file in one.iterdir()))
    recipe.distillation.checkpoints.mkdir(parents=True)
    small_disk = """
        mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99
        folder=$2 && shift 2
        "$@"
        code=$?
        cp -r "$folder" "$folder saved"
        exit $code
    """
    distilling = fresh("tests.training.dying", "distill", path)
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", small_disk, "sh", str(size), str(recipe.distillation.checkpoints), *distilling],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment({"DIE": "0:full:2"}),
    )
    printed = done.stdout + done.stderr
    for step in (4, 6):
        assert f"warning: no checkpoint of step {step}: rank" in printed
    assert "No space left on device" in printed
    assert "make room and run the same command" in printed
    assert done.returncode not in (0, 99), printed
    recipe.distillation.checkpoints.rmdir()
    Path(f"{recipe.distillation.checkpoints} saved").rename(recipe.distillation.checkpoints)
    (recipe.distillation.checkpoints / "filler").unlink()
    assert sorted(file.name for file in recipe.distillation.checkpoints.iterdir()) == ["latest", "step-000002"]
    command("distill", path)
    expect_same(path, uninterrupted)


@pytest.mark.launcher
def test_a_rank_that_does_not_answer_is_named_and_the_run_ends(new_run: Callable[..., Path]) -> None:
    path = new(new_run, steps=100000, timeout=6)
    with subprocess.Popen(
        fresh("ppcl_ds.cli", "distill", path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as distilling:
        assert distilling.stdout is not None
        for line in distilling.stdout:  # the first progress line: the ranks are training
            if "distill: " in line:
                break
        [still] = [pid for pid in ranks_of(path) if psutil.Process(pid).environ().get("RANK") == "1"]
        os.kill(still, signal.SIGSTOP)
        began = time.monotonic()
        _, printed = distilling.communicate(timeout=120)
    assert time.monotonic() - began < 50  # several time-outs
    assert distilling.returncode != 0
    expect_named(printed, "error: rank 1 on ", "does not answer in phase '")
    assert not ranks_of(path)


def test_a_rank_that_waits_for_its_data_is_named_and_the_run_ends(new_run: Callable[..., Path]) -> None:
    path = new(new_run, timeout=6)
    done = run_dying(path, "1:data:6")
    assert done.returncode != 0
    # A rank reads two micro-batches a step, each while it trains on the one before: the sixth in step 3.
    expect_named(done.stderr, "error: rank 1 on ", "stands still in phase 'data' of step 3; the others have waited")


def expect_named(printed: str, *words: str) -> None:
    named = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(named) == 1, printed
    assert all(word in named[0] for word in words), named


def run_dying(path: Path, death: str) -> Done:
    return run("tests.training.dying", "distill", path, env={"DIE": death})
