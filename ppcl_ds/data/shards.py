"""Samples by their numbers, wherever the shards lie: a folder, an http(s) address, or what a command prints."""

from __future__ import annotations

import io
import os
import random
import shlex
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from webdataset.cache import download

from ppcl_ds.atomic import sha256
from ppcl_ds.data.index import ShardEntry, scan
from ppcl_ds.errors import UserError, brief

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the tries to read a shard."""

_OPEN_FILES = 32
"""Shards that stay open; a window seldom touches more."""


class BadSampleError(Exception):
    """A sample that cannot be used; the message is `shard:key: why`."""


class Shards:
    """The samples of some shards, numbered as their index lists them.

    Nothing but the sample itself is read. Shards of an address are fetched whole, through webdataset, into a cache that
    the worker processes of a training process share, and compared with their index.

    Args:
        entries: what the index says.
        place: the folder they lie in, or an address with `{name}` in it.
        cache: an empty folder of this process for what is fetched; needed for an address alone.
        cache_size: bytes that the cache may take.

    Raises:
        UserError: the cache is too small for a shard.
    """

    def __init__(
        self, entries: Sequence[ShardEntry], place: Path | str, cache: Path | None = None, cache_size: int = 1
    ) -> None:
        self.place, self.cache = place, cache
        self.starts = np.cumsum([0, *(entry.samples for entry in entries)])
        """Number of the first sample of each shard; after them, how many there are."""
        # Arrays, because every worker process of every rank has them.
        self.begins = np.array([offset for entry in entries for offset in entry.offsets], dtype=np.int64)
        """Where each sample begins in its shard, in bytes."""
        self.ends = np.array([end for e in entries for end in [*e.offsets, e.size][1:] if e.offsets], dtype=np.int64)
        self.entries = [entry.model_copy(update={"offsets": [], "shapes": {}}) for entry in entries]
        self.cache_size, largest = cache_size, max(entry.size for entry in entries)
        if cache is not None and cache_size < largest:
            raise UserError(f"data.cache is {cache_size} bytes, but one shard alone takes {largest}")
        # A file that is open keeps its room on the disk after it was deleted.
        self.open_files = _OPEN_FILES if cache is None else 1
        self._open: OrderedDict[int, io.BufferedReader] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}  # a process opens its own files

    def read(self, number: int) -> tuple[str, dict[str, bytes]]:
        """One sample, undecoded.

        Returns:
            `shard:key`, and what each suffix holds.

        Raises:
            BadSampleError: it is damaged or lacks a part.
            UserError: its shard cannot be read, after some tries.
        """
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        entry = self.entries[shard]
        start, end = int(self.begins[number]), int(self.ends[number])
        data = self._bytes(shard, start, end - start)
        found, problems = scan(io.BytesIO(data), closed=False)
        if not found or found[0].offset:
            why = problems[0] if problems else "not there"
            raise BadSampleError(
                f"{entry.name}:{why}" + ("" if len(data) == end - start else ": the shard is cut short")
            )
        sample = found[0]
        return f"{entry.name}:{sample.key}", {s: data[at : at + size] for s, (at, size) in sample.parts.items()}

    def _bytes(self, shard: int, start: int, length: int) -> bytes:
        """A part of a shard; a file server or network that is away for a moment is waited for."""
        for wait in (*WAITS, None):
            try:
                return os.pread(self._file(shard).fileno(), length, start)
            except (OSError, ValueError) as fault:
                why = brief(fault)
            if shard in self._open:
                self._open.pop(shard).close()
            if wait is not None:
                time.sleep(wait * random.uniform(0.5, 1.5))  # not all ranks at once
        raise UserError(
            f"shard {self.entries[shard].name} cannot be read after {len(WAITS) + 1} tries ({why}); "
            "restore it and run the same command again"
        )

    def _file(self, shard: int) -> io.BufferedReader:
        if shard not in self._open:
            while len(self._open) >= self.open_files:
                self._open.popitem(last=False)[1].close()
            entry = self.entries[shard]
            self._open[shard] = (
                self._fetched(entry) if isinstance(self.place, str) else (self.place / entry.name).open("rb")
            )
        self._open.move_to_end(shard)
        return self._open[shard]

    def _fetched(self, entry: ShardEntry) -> io.BufferedReader:
        assert self.cache is not None
        path = self.cache / entry.name
        with FileLock(self.cache / "lock"):  # one at a time makes room and fetches
            if not path.exists():
                self._make_room(entry.size)
                new = self.cache / f"{entry.name}.new"
                fetch(str(self.place).replace("{name}", entry.name), new)
                if (new.stat().st_size, sha256(new)) != (entry.size, entry.sha256):
                    raise ValueError("it is not the shard that the index describes")
                new.rename(path)
            os.utime(path)  # the least recently used goes first
            return path.open("rb")

    def _make_room(self, needed: int) -> None:
        assert self.cache is not None
        held = sorted(self.cache.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)
        used = sum(path.stat().st_size for path in held)
        for path in held:
            if used + needed > self.cache_size:
                used -= path.stat().st_size
                path.unlink()


def fetch(address: str, path: Path) -> None:
    """Write what a `pipe:` command prints, or an http(s) address holds, to a file; one try, through webdataset.

    Raises:
        OSError: the command or the server failed.
    """
    if address.startswith(("http://", "https://")):
        # webdataset's own call tries for minutes and waits without end for a server that says nothing.
        address = f"pipe:curl -fsSL --connect-timeout 10 --speed-limit 1024 --speed-time 30 {shlex.quote(address)}"
    download(address, str(path))
