"""A command keeps a report that others read, whether it ends well, is stopped or fails."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from ppcl_ds import console, reporting
from ppcl_ds.errors import UserError
from ppcl_ds.reporting import Report, last_words, read_report

HERE = f"{os.getpid()} on {socket.gethostname()}"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of this process's report, as a task of a job array that `ppcl submit` has queued."""
    for name, value in {"PPCL_SLURM": str(tmp_path), "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    yield tmp_path / "logs" / "7_2.json"
    reporting.keep_in(None)


def test_it_says_how_far_a_command_is(path: Path) -> None:
    reporting.keep_in(reporting.of_job())
    with console.progress("draw", 4, done=1) as advance:
        assert read_report(path) == Report(what="draw", step=1, total=4, job="7", process=HERE)
        advance(1, rate=2.5)
        found = read_report(path)
        assert (found.state, found.step, found.samples_per_second) == ("running", 2, 2.5)
        assert found.seconds_left is not None
        advance(2)
    assert read_report(path) == Report(
        state="done", what="draw", step=4, total=4, samples_per_second=2.5, job="7", process=HERE
    )
    with pytest.raises(SystemExit), console.progress("draw", 4) as advance:
        raise SystemExit(143)
    assert read_report(path).state == "stopped"


@pytest.mark.parametrize(
    ("fault", "said"),
    [(UserError("no such folder"), "error: no such folder"), (RuntimeError("a\nb"), "RuntimeError: a b")],
)
def test_what_ends_a_command_is_its_last_word(
    path: Path, tmp_path: Path, fault: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        with console.progress("draw", 4) as advance:
            advance(3)
            raise fault

    monkeypatch.setattr("sys.argv", ["ppcl"])
    with pytest.raises((SystemExit, RuntimeError)):
        console.run(app)
    found = read_report(path)
    assert (found.state, found.step, found.fault) == ("failed", 3, said)
    assert last_words(tmp_path / "error.json") == said


def test_other_ranks_leave_only_their_last_words(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    reporting.keep_in(reporting.of_job()).fail("error: lost")
    assert not path.exists()
    assert last_words(tmp_path / "error.json") == "error: lost"


def test_without_a_job_there_is_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PPCL_SLURM")
    assert reporting.of_job() is None
