"""A run that is asked to stop does so behind its next step, on every rank, and goes on later as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ppcl_ds.distill.checkpoint import newest_checkpoint
from ppcl_ds.recipe import load_recipe
from ppcl_ds.watch.board import read_scalars
from tests.conftest import command
from tests.distill.test_library import PLAN


def test_a_stop_file_ends_a_run_behind_its_next_step(new_run: Callable[..., Path]) -> None:
    path = new_run("qwen", distill={"steps": 4})
    recipe = load_recipe(path)
    PLAN.save(recipe.plan_file)
    stop = recipe.run / "STOP"
    stop.touch()
    assert f"stops behind step 1 ({stop}), with a checkpoint" in command("distill", path)
    assert newest_checkpoint(recipe.distillation.checkpoints).contents.step == 1
    assert (recipe.run / "distill" / "stopped").read_text() == "STOP\n"
    assert "stops behind step 2" in command("distill", path)
    stop.unlink()
    command("distill", path)
    assert recipe.distilled
    assert not (recipe.run / "distill" / "stopped").exists()
    assert [step for step, _ in read_scalars(recipe.distillation.board)["run/loss"]] == [1, 2, 3, 4]
