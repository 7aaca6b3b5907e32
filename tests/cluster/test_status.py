"""What `ppcl status` says of a job, from what Slurm, torchrun and the job's own commands have left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ppcl_ds.cluster.slurm import Job
from ppcl_ds.cluster.status import START, Jobs
from ppcl_ds.cluster.submitted import Queued
from ppcl_ds.reporting import Report

EXITED = "srun: error: n2: task 1: Exited with exit code 1\nsrun: error: n1: task 0: Killed\n"
KILLED = "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 1\n"
SIGNAL = """\
 Root Cause (first observed failure):
[0]:
  time      : 2025-01-01_00:00:00
  host      : n1
  rank      : 0 (local_rank: 0)
  exitcode  : -9 (pid: 123)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 123
"""
LIMIT = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2025-01-01T00:00:00 DUE TO TIME LIMIT ***\n"
UNCHANGED = "error: the ranks have failed (exit code 1) without a checkpoint since this start; not requeued"


def jobs(folder: Path, log: str, state: str = "FAILED", **report: object) -> Jobs:
    """A distillation as job 7, whose log is this."""
    out = folder / "distill-7.out"
    out.write_text(log)
    reports = [Report(job="7", total=12).model_copy(update=report)]
    known = [Job("7", "7", state, "0:00", "None")] if state else []
    return Jobs(Queued(step="distill", job="7"), known, reports, [out])


def last_words(folder: Path, start: int, node: str, rank: int, words: str, seconds: int) -> None:
    """What a rank leaves where torchrun looks for it."""
    path = folder / "distill-7" / f"start-{start}" / node / "none_abc" / "attempt_0" / str(rank) / "error.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"message": {"message": words, "extraInfo": {"timestamp": str(seconds)}}}))
    os.utime(path, (seconds, seconds))


def test_the_first_rank_that_failed_is_named(tmp_path: Path) -> None:
    last_words(tmp_path, 0, "n1", 0, "RuntimeError: of an earlier start", 1)
    last_words(tmp_path, 1, "n1", 3, "RuntimeError: connection closed by peer", 9)
    last_words(tmp_path, 1, "n2", 2, "RuntimeError: out of luck", 8)
    found = jobs(tmp_path, f"{START}0\n{KILLED}\n{START}1\n{EXITED}\n{UNCHANGED}\n")
    assert found.fault == "n2, local rank 2: RuntimeError: out of luck"
    assert not found.well
    assert found.cells[-1] == "2"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (KILLED, "n2: the launcher was killed"),
        (SIGNAL + EXITED, "rank 0 on n1: Signal 9 (SIGKILL) received by PID 123"),
        (LIMIT, "JOB 7 ON n1 CANCELLED AT 2025-01-01T00:00:00 DUE TO TIME LIMIT"),
        (f"{UNCHANGED}\nsrun: error: n1: task 0: Exited with exit code 1\n", UNCHANGED),
        (f"{KILLED}\n{START}1\n{UNCHANGED}\n", UNCHANGED),
    ],
)
def test_without_last_words_slurm_and_torchrun_are_asked(tmp_path: Path, log: str, said: str) -> None:
    assert jobs(tmp_path, log).fault == said


def test_the_last_words_of_a_command_without_ranks(tmp_path: Path) -> None:
    assert jobs(tmp_path, "Traceback\n", fault="error: no such folder").fault == "error: no such folder"


@pytest.mark.parametrize(("state", "step", "well"), [("RUNNING", 3, True), ("", 3, False), ("", 12, True)])
def test_what_slurm_has_forgotten_is_judged_by_its_report(tmp_path: Path, state: str, step: int, well: bool) -> None:
    found = jobs(tmp_path, "", state, step=step, samples_per_second=2.0, seconds_left=90.5)
    assert found.well == well
    assert found.cells[2:6] == (state or "forgotten by Slurm", f"{step} of 12", "2", "0:01:30")
