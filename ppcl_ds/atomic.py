"""Files and folders that exist whole or not at all (written under another name, then renamed); room and checksums."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ppcl_ds.errors import UserError


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file; a kill in the middle leaves the old one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync(partial)
    os.replace(partial, path)
    fsync(path.parent)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            whole.update(block)
    return whole.hexdigest()


def fsync(path: Path) -> None:
    """Have the operating system write out a file or a folder's list of names, so that a power cut cannot lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; when the block ends well it takes the place of `path`, old content and all.

    When the block fails, what it wrote is removed and `path` stays as it was. Only a kill leaves `.PATH.ppcl-partial`,
    which the next attempt replaces.
    """
    path = path.resolve()  # `.` and `..` have no name beside which another could stand
    partial, old = (path.with_name(f".{path.name}.ppcl-{what}") for what in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in sorted(partial.rglob("*")):
            fsync(file)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def require_space(path: Path, wanted: int) -> None:
    """Refuse to begin what the disk under `path` cannot hold.

    Args:
        path: what is to be written; need not exist yet.
        wanted: bytes.

    Raises:
        UserError: less is free.
    """
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < wanted:
        raise UserError(
            f"{path} needs {wanted / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free on its disk; "
            "make room, or choose another folder"
        )


@contextmanager
def disk_errors_as_one_line(path: Path) -> Iterator[None]:
    """What can go wrong on the way to the disk, as one line.

    Raises:
        UserError: instead of what a file system or safetensors raises.
    """
    try:
        yield
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{path} cannot be written ({fault}); nothing is left of it") from None
