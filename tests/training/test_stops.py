"""Ctrl-C and SIGTERM stop a training after its step, whenever they come; it goes on as if nothing had been."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ppcl_ds.recipe import load_recipe
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.watch.lock import FolderLock
from ppcl_ds.watch.tensorboard import read_scalars
from tests.conftest import command
from tests.plans import three_spans
from tests.ranks import run

MOMENTS = 20


def test_a_run_that_is_stopped_at_any_moment_loses_at_most_a_step(new_run: Callable[..., Path]) -> None:
    path = new_run("qwen", distill={"steps": 10**6, "log_every": 1, "checkpoint_every": 10**6})
    recipe = load_recipe(path)
    three_spans().save(recipe.plan_file)
    folder, moments, reached, trained = recipe.distillation, random.Random(0), 0, 0
    calls = path.with_name("calls")
    run("tests.training.signalled", "distill", path, "--until", "1", env={"ASKED": "0:0:0", "CALLS": str(calls)})
    before_the_first_step = int(calls.read_text())
    for number in range(MOMENTS):
        asked, code = [(signal.SIGINT, 130), (signal.SIGTERM, 143)][number % 2]
        asks = f"{moments.randrange(2)}:{asked:d}:{moments.randrange(2 * before_the_first_step)}"
        done = run("tests.training.signalled", "distill", path, env={"ASKED": asks})
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        if not folder.begun:
            continue
        checkpoint = newest_checkpoint(folder.checkpoints)
        for unit in three_spans().units:
            checkpoint.unit(unit.name)  # is whole
        logged = read_scalars(folder.board)["run/loss"]
        assert [step for step, _ in logged] == list(range(1, checkpoint.contents.step + 1))
        trained += checkpoint.contents.step > reached
        reached = checkpoint.contents.step
    assert MOMENTS / 4 < trained < MOMENTS, "moments before and after the first step"
    assert not list(folder.checkpoints.glob("*.partial"))


def test_a_second_start_is_refused_and_the_first_goes_on(new_run: Callable[..., Path]) -> None:
    path = new_run("qwen", distill={"steps": 4})
    recipe = load_recipe(path)
    three_spans().save(recipe.plan_file)
    with FolderLock(recipe.distillation.path):
        assert "distill is being trained by process" in command("distill", path, code=2)
    command("distill", path)
    assert recipe.distillation.finished(4)


@pytest.mark.parametrize(("asked", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_whose_exception_is_lost_ends_the_run_after_its_first_step(
    new_run: Callable[..., Path], asked: signal.Signals, code: int
) -> None:
    path = new_run("qwen", distill={"steps": 10**6})
    recipe = load_recipe(path)
    three_spans().save(recipe.plan_file)
    done = run("tests.training.signalled", "distill", path, env={"ASKED": f"1:{asked:d}:5000", "SWALLOWED": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert newest_checkpoint(recipe.distillation.checkpoints).contents.step == 1
