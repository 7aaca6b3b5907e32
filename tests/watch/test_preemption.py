"""A run that is asked to stop does so after its next step, on every rank, and goes on later as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.watch.tensorboard import read_scalars
from tests.conftest import command
from tests.export.trained import pretend_trained
from tests.ranks import run

TRAININGS = {"distill": ["distill"], "finetune": ["finetune", "--variant", "small"]}


@pytest.mark.parametrize("training", list(TRAININGS))
def test_a_stop_file_ends_a_run_after_its_next_step(
    new_run: Callable[..., Path], training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *options = TRAININGS[training]
    path = new_run("qwen", distill={"steps": 4})
    raw = yaml.safe_load(path.read_text())
    raw["finetune"] = raw["distill"] | {"steps": 4}
    path.write_text(yaml.safe_dump(raw))
    recipe = pretend_trained(path, "qwen")
    folder = recipe.distillation
    if training == "distill":
        (folder.checkpoints / "latest").unlink()
    else:
        folder = recipe.finetuning("small")
    stop = recipe.run / "STOP"
    stop.touch()
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # the file may have been made while the job was waiting
    done = run("ppcl_ds.cli", name, path, *options)
    assert done.returncode == 0, done.stderr
    assert f"stops after step 1 ({stop}), with a checkpoint" in done.stdout
    assert newest_checkpoint(folder.checkpoints).contents.step == 1
    assert (folder.path / "stopped").read_text() == "STOP\n"
    assert "stops after step 2" in command(name, path, *options)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert f"{stop} was of an earlier run and has been removed" in command(name, path, *options)
    assert not stop.exists()
    assert folder.finished(4)
    assert not (folder.path / "stopped").exists()
    assert [step for step, _ in read_scalars(folder.board)["run/loss"]] == [1, 2, 3, 4]
