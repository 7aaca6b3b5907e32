"""A training as a Slurm job, to which things happen; in the end its losses are those of a run left in peace."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.watch.tensorboard import read_scalars
from tests.conftest import command
from tests.slurm.conftest import Account


class Training:
    """A job of an account that trains something, watched and tampered with.

    Args:
        step: `distill` or `finetune`.
        parts: that its checkpoints hold.
    """

    def __init__(self, account: Account, step: str, parts: Sequence[str]) -> None:
        self.account, self.daemons, self.parts = account, account.daemons, parts
        self.job = account.chain()[step] + ("_0" if step == "finetune" else "")
        self.folder = self.recipe.distillation if step == "distill" else self.recipe.finetuning("small")

    @property
    def recipe(self) -> Recipe:
        """With the run folder as this process sees it."""
        return load_recipe(self.account.recipe).model_copy(update={"run": self.account.run})

    @property
    def state(self) -> str:
        return self.daemons.run("squeue", "--noheader", "--states=all", f"--jobs={self.job}", "--format=%T").strip()

    @property
    def saved(self) -> int:
        """Step of the newest checkpoint; every byte of it can be read."""
        if not (self.folder.checkpoints / "latest").exists():
            return 0
        checkpoint = newest_checkpoint(self.folder.checkpoints)
        for part in self.parts:
            assert checkpoint.unit(part)
            for moment in ("exp_avg", "exp_avg_sq"):
                assert checkpoint.part(part, moment, 0, 10**9).numel()
        return checkpoint.contents.step

    def wait(self, what: str, is_so: Callable[[], object], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, f"waited {seconds} s for {what}\n{self.account.everything()}"
            time.sleep(0.3)

    def makes_progress(self) -> int:
        """Wait for a new checkpoint by a start that is running; returns its step."""
        self.wait("a start", lambda: self.state == "RUNNING")
        before = self.saved
        self.wait("a checkpoint", lambda: self.saved > before)
        return self.saved

    def is_requeued(self, seconds: float = 120) -> None:
        """Wait until it is in line again; see that nothing of it runs any more and that its checkpoint is whole."""
        self.wait("the requeue", lambda: self.state == "PENDING", seconds)
        self.wait("the end of its processes", lambda: not self.daemons.processes(), 30)
        assert self.saved

    def is_released(self) -> None:
        """Have it start now, not in the two minutes that Slurm holds a requeued job."""
        # Slurm counts in seconds: what starts in the one in which it was requeued has no valid credential.
        time.sleep(2)
        self.daemons.run("scontrol", "update", f"jobid={self.job}", "starttime=now")


def expect_undisturbed(training: Training, folder: Path, *arguments: str) -> None:
    """Repeat the run in peace, by `ppcl ARGUMENTS`, up to where it has come; its losses must be the same to the bit."""
    interrupted, step = training.recipe, training.saved
    run = folder / "run"
    shutil.copytree(interrupted.run, run, ignore=shutil.ignore_patterns(training.folder.path.name, "slurm", "STOP"))
    recipe = yaml.safe_load(training.account.recipe.read_text()) | {"run": str(run)}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    name, *options = arguments
    command(name, path, *options, "--until", str(step))
    board = run / training.folder.board.relative_to(interrupted.run)
    found, expected = (
        {name: points for name, points in read_scalars(each).items() if "loss" in name.split("/")}
        for each in (training.folder.board, board)
    )
    assert [number for number, _ in expected["run/loss"]] == list(range(1, step + 1))
    assert found == expected
