"""A training folder belongs to one training at a time, and to nobody after a crash."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ppcl_ds.errors import UserError
from ppcl_ds.watch.lock import FolderLock, check_lock

HOLDS = """
import sys, time
from pathlib import Path
from ppcl_ds.watch.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_the_holder_is_named_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for asks in (check_lock, FolderLock):
            with pytest.raises(UserError, match=f"trained by process {holder.pid} on {socket.gethostname()}; wait"):
                asks(tmp_path)
        os.kill(holder.pid, signal.SIGKILL)
    with FolderLock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    FolderLock(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for asks in (check_lock, FolderLock):
        with pytest.raises(UserError, match="file/distill cannot be written into"):
            asks(tmp_path / "file" / "distill")
    check_lock(tmp_path / "new" / "distill")
    assert not (tmp_path / "new").exists()
