"""One training at a time in a folder: a lock that names its holder and is gone with it, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from ppcl_ds.errors import UserError


def check_lock(folder: Path) -> None:
    """Whether a `FolderLock` could be had now; nothing is written.

    Raises:
        UserError: another process holds it; or nothing can be written into the folder.
    """
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(f"{folder} cannot be written into: {existing} is no folder, or read-only")
    if (folder / "lock").exists():
        FolderLock(folder).close()


def holder(folder: Path) -> str:
    """Who trains in a folder now, such as `process 7 on host`; empty: nobody, as far as the file system tells."""
    try:
        with (folder / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return (folder / "lock").read_text().strip() or "another process"
    except OSError:
        pass  # there is none, or it keeps no locks
    return ""


class FolderLock:
    """Holds `FOLDER/lock` from its making until it is closed, or its process has ended.

    The file system keeps the lock, so a crash leaves none behind, and over NFS and Lustre other nodes see it. A file
    system that keeps no locks is trained on without one.

    Args:
        folder: made if it is not there.

    Raises:
        UserError: another process holds it; or nothing can be written into the folder.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+")
        except OSError as fault:
            raise UserError(f"{folder} cannot be written into ({fault.strerror})") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise UserError(f"{folder} is being trained by {holder}; wait for it, or stop it first") from None
        except OSError:
            return
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        self.file.close()
