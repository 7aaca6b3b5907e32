"""Ranks on this machine: what was typed, one line for a fault, one exit code, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.ranks import Done, afresh, environment, fresh

pytestmark = pytest.mark.launcher


def launched(case: str, folder: Path) -> Done:
    done = afresh("tests.launched", case, folder, timeout=60)
    expect_nobody(folder)
    return done


def pids(folder: Path) -> list[int]:
    return [int(path.suffix[1:]) for path in folder.glob("?.*")]


def expect_nobody(folder: Path) -> None:
    """No rank is left, within a few seconds."""
    assert len(pids(folder)) == 2
    end = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids(folder))) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids(folder)))


def test_ranks_run_what_was_typed_and_their_end_is_the_command_s(tmp_path: Path) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    done = launched("well", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "starting 2 processes\n"
    assert {path.read_text() for path in folder.iterdir()} == {f"well {folder}"}


@pytest.mark.parametrize(
    ("case", "lines", "code"),
    [
        ("same fault", ["error: the shard is gone"], 2),
        ("own fault", ["error: rank 0 cannot write", "error: rank 1 cannot write"], 2),
        ("one fault", ["error: a sample is cut"], 2),
        ("killed", ["error: the process of rank 1 was ended by SIGKILL; was there enough memory?"], 137),
    ],
)
def test_a_fault_is_said_once_and_ends_all_ranks(tmp_path: Path, case: str, lines: list[str], code: int) -> None:
    done = launched(case, tmp_path)
    assert sorted(done.stderr.splitlines()) == lines
    assert done.returncode == code


@pytest.mark.parametrize(
    ("case", "signals", "code"),
    [
        ("waits", [signal.SIGINT], 130),
        ("waits", [signal.SIGTERM], 143),
        ("stubborn", [signal.SIGINT, signal.SIGINT], 130),
        ("waits", [signal.SIGKILL], -9),
        ("stubborn", [signal.SIGKILL], -9),
    ],
)
def test_who_ends_the_launcher_ends_the_ranks(tmp_path: Path, case: str, signals: list[int], code: int) -> None:
    command = fresh("tests.launched", case, tmp_path)
    # As a terminal starts it: a group of its own, all of which Ctrl-C reaches.
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, start_new_session=True) as launcher:
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("* waits"))) < 2:
            assert launcher.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        for number in signals:
            os.killpg(launcher.pid, number)
            time.sleep(0.3)
        _, printed = launcher.communicate(timeout=20)
    assert launcher.returncode == code
    assert b"Traceback" not in printed
    expect_nobody(tmp_path)
