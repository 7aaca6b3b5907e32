"""What `ppcl status` says of a run from its folder alone: no Slurm, no torch, whatever state a step is in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppcl_ds import reporting
from ppcl_ds.cluster.road import RunStatus, disk_bytes, gigabytes, look
from ppcl_ds.cluster.status import status
from ppcl_ds.cluster.submitted import Queued, write_chain
from ppcl_ds.recipe import Recipe, checkpoint_tag, load_recipe
from ppcl_ds.record import write_down
from ppcl_ds.reporting import Report
from ppcl_ds.watch.lock import FolderLock, holder
from tests.test_recipe import TEXT

TUNED = "finetune: {steps: 2, micro_batch: 2, micro_batches_per_step: 1, variants: [small]}\n"
HERE = f"{os.getpid()} on {socket.gethostname()}"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "my recipe.yaml"
    path.write_text(TEXT.replace("run: runs/a", f"run: '{tmp_path / 'run'}'") + TUNED)
    return load_recipe(path)


def write(path: Path, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def report(path: Path, **said: Any) -> None:
    write(path, Report(**said).model_dump_json())


def planned(recipe: Recipe) -> None:
    for name in ("raw", "encoded"):
        write(recipe.data.shards / name / "index.json")
    write(recipe.plan_file, "variants: {small: []}\n")


def reached(recipe: Recipe, step: int) -> None:
    checkpoints = recipe.distillation.checkpoints
    (checkpoints / checkpoint_tag(step)).mkdir(parents=True)
    write(checkpoints / "latest", checkpoint_tag(step))


def states(found: RunStatus) -> dict[str, str]:
    return {step.name: step.state for step in found.steps}


def test_a_new_run_begins_with_its_data(recipe: Recipe) -> None:
    found = look(recipe, "r.yaml")
    assert states(found) == {
        "shard": "next",
        **dict.fromkeys(("encode", "probe", "plan", "distill", "finetune small", "consolidate", "evaluate"), "later"),
    }
    assert (found.next, found.disk_bytes) == ("ppcl-data shard r.yaml", 0)


def test_a_training_is_running_while_its_folder_is_locked(recipe: Recipe) -> None:
    planned(recipe)
    reached(recipe, 2)
    training = recipe.distillation
    report(training.progress, state="running", step=3, total=4, loss=0.5, samples_per_second=8.0, seconds_left=60.0)
    with FolderLock(training.path):
        assert holder(training.path) == f"process {os.getpid()} on {socket.gethostname()}"
        found = look(recipe, "r.yaml")
    step = next(step for step in found.steps if step.name == "distill")
    assert (step.state, step.step, step.total, step.loss, step.samples_per_second) == ("running", 3, 4, 0.5, 8.0)
    assert (step.seconds_left, step.checkpoint, found.next) == (60.0, "step-000002", "")
    assert step.cells[2:6] == ("3 of 4", "0.5", "8", "0:01:00")
    killed = look(recipe, "r.yaml")  # nobody holds it any more: it goes on from its checkpoint
    step = next(step for step in killed.steps if step.name == "distill")
    assert (step.state, step.step, killed.next) == ("stopped", 2, "ppcl distill r.yaml")


def test_a_failed_training_says_what_ended_it_and_a_finished_one_does_not(recipe: Recipe) -> None:
    planned(recipe)
    report(recipe.distillation.progress, state="failed", step=3, total=4, fault="error: no space")
    found = look(recipe, "r.yaml")
    assert [(step.state, step.fault) for step in found.steps if step.fault] == [("failed", "error: no space")]
    assert found.next == "ppcl distill r.yaml"
    reached(recipe, 4)
    found = look(recipe, "r.yaml")
    assert not [step.fault for step in found.steps if step.fault]
    assert states(found) | {"distill": "done", "finetune small": "next", "consolidate": "later"} == states(found)
    assert found.next == "ppcl finetune r.yaml --variant small"


def test_other_steps_keep_a_report_of_their_own(recipe: Recipe) -> None:
    planned(recipe)
    recipe.plan_file.unlink()
    path = reporting.of_step(recipe.run, "probe")
    report(path, state="running", what="read", step=3, total=8, process=HERE)
    assert states(look(recipe, "r.yaml"))["probe"] == "running"
    report(path, state="running", what="read", step=3, total=8, process=f"999999999 on {socket.gethostname()}")
    assert states(look(recipe, "r.yaml"))["probe"] == "stopped"
    report(path, state="failed", fault="error: gone", process=HERE)
    found = look(recipe, "r.yaml")
    assert [step.fault for step in found.steps if step.state == "failed"] == ["error: gone"]
    write(recipe.probe_folder / "report.json")
    assert states(look(recipe, "r.yaml"))["probe"] == "done"


def test_disk_is_what_du_says(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", "x" * 10_000)
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(10**9)
    du = subprocess.run(["du", "-s", "-B1", tmp_path], capture_output=True, text=True, check=True)
    folders = 2 * tmp_path.stat().st_blocks * 512
    assert disk_bytes(tmp_path) == pytest.approx(int(du.stdout.split()[0]) - folders, abs=8192)
    assert [gigabytes(size) for size in (0, 999, 1_500, 2_340_000_000)] == ["0 bytes", "999 bytes", "1.5 kB", "2.34 GB"]


def ppcl(*arguments: str | Path, code: int = 0) -> str:
    """What a user sees; and no torch is imported."""
    program = "import sys\nfrom ppcl_ds.cli import main\nsys.modules['torch'] = None\nmain()"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd="/")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def path(recipe: Recipe, tmp_path: Path) -> Path:
    return tmp_path / "my recipe.yaml"


def test_it_is_a_table_or_json_of_a_recipe_or_a_run_folder(recipe: Recipe, path: Path) -> None:
    planned(recipe)
    report(recipe.distillation.progress, state="failed", total=4, fault="error: " + "very long " * 30)
    printed = ppcl("status", path, "--set", "distill.steps=5").splitlines()
    assert f"next: ppcl distill '{path}' --set distill.steps=5" in printed
    assert "distill: error: " + "very long " * 30 in printed  # on one line
    found = json.loads(ppcl("status", path, "--json"))
    assert found["next"] == f"ppcl distill '{path}'"
    assert [step["state"] for step in found["steps"]][:5] == ["done", "done", "done", "done", "failed"]
    assert "no command has left its recipe here; give the recipe file" in ppcl("status", recipe.run, code=2)
    write_down(recipe, "probe")
    assert json.loads(ppcl("status", recipe.run, "--json"))["next"] == "ppcl distill RECIPE"
    (recipe.run / "commands.jsonl").unlink()
    write(recipe.distillation.recipe, recipe.model_dump_json())
    assert json.loads(ppcl("status", recipe.run, "--json"))["next"] == "ppcl distill RECIPE"
    assert "give one of them" in ppcl("status", path, "--watch", "--json", code=2)


def test_it_is_drawn_anew_until_it_is_stopped(
    recipe: Recipe, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(recipe)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        if slept:
            raise KeyboardInterrupt
        slept.append(seconds)
        reached(recipe, 2)

    monkeypatch.setattr("ppcl_ds.cluster.status.time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        status(path, watch=True)
    assert "step-000002" in capsys.readouterr().out  # which was not there at first


def test_of_submitted_jobs_slurm_is_asked_where_it_is(
    recipe: Recipe, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in of squeue: what it says of a job stands below the road, with the first error of its ranks."""
    planned(recipe)
    write_chain(recipe.run, [Queued(step="distill", job="7")])
    report(recipe.distillation.progress, state="failed", step=1, total=4, job="7", fault="error: no space left")
    monkeypatch.setenv("PATH", "/nowhere")
    status(path)
    assert "Slurm's commands tell, which are not on the PATH here" in capsys.readouterr().out
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho '7|7|FAILED|0:00|None'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    status(path)
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("distill: error: no space left") == 1  # of the step and of its job
    assert any("FAILED" in line and "1 of 4" in line for line in lines)
    status(path, as_json=True)
    [job] = json.loads(capsys.readouterr().out)["jobs"]
    assert (job["step"], job["state"], job["fault"]) == ("distill", "FAILED", "error: no space left")
