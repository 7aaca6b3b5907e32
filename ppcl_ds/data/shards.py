"""Samples by their numbers, wherever the shards lie: a folder, an http(s) address, or what a command prints."""

from __future__ import annotations

import io
import os
import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from webdataset.cache import LRUCleanup, download

from ppcl_ds.data.index import ShardEntry, scan, sha256
from ppcl_ds.errors import UserError

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the tries to open a shard."""

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
    """

    def __init__(
        self, entries: Sequence[ShardEntry], place: Path | str, cache: Path | None = None, cache_size: int = 1
    ) -> None:
        self.place, self.cache = place, cache
        self.starts = np.cumsum([0, *(entry.samples for entry in entries)])
        """Number of the first sample of each shard; behind them, how many there are."""
        # Arrays, because every worker process of every rank has them.
        self.begins = np.array([offset for entry in entries for offset in entry.offsets], dtype=np.int64)
        """Where each sample begins in its shard, in bytes."""
        self.ends = np.array([end for e in entries for end in [*e.offsets, e.size][1:] if e.offsets], dtype=np.int64)
        self.entries = [entry.model_copy(update={"offsets": [], "shapes": {}}) for entry in entries]
        self.cleaner = LRUCleanup(str(cache), cache_size, interval=None)
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
            UserError: its shard cannot be opened, after some tries.
        """
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        entry = self.entries[shard]
        own = number - int(self.starts[shard])
        start, end = int(self.begins[number]), int(self.ends[number])
        file = self._file(shard)
        try:
            data = os.pread(file.fileno(), end - start, start)
        except OSError as fault:
            raise BadSampleError(f"{entry.name}:{own}: cannot be read ({fault.strerror})") from None
        found, complaints = scan(io.BytesIO(data), closed=False)
        if not found or found[0].offset:
            why = complaints[0] if complaints else "not there"
            raise BadSampleError(
                f"{entry.name}:{why}" + ("" if len(data) == end - start else ": the shard is cut short")
            )
        sample = found[0]
        return f"{entry.name}:{sample.key}", {s: data[at : at + size] for s, (at, size) in sample.parts.items()}

    def _file(self, shard: int) -> io.BufferedReader:
        if shard not in self._open:
            self._open[shard] = self._reach(self.entries[shard])
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def _reach(self, entry: ShardEntry) -> io.BufferedReader:
        """Open a shard; a file server or network that is away for a moment is waited for."""
        for wait in (*WAITS, None):
            try:
                return (self._fetched(entry) if isinstance(self.place, str) else self.place / entry.name).open("rb")
            except (OSError, ValueError) as fault:
                why = str(fault)
            if wait is not None:
                time.sleep(wait * random.uniform(0.5, 1.5))  # not all ranks at once
        raise UserError(
            f"shard {entry.name} cannot be opened after {len(WAITS) + 1} tries ({why}); "
            "restore it and run the same command again"
        )

    def _fetched(self, entry: ShardEntry) -> Path:
        assert self.cache is not None
        path = self.cache / entry.name
        with FileLock(f"{path}.lock"):
            if not path.exists():
                self.cleaner.cleanup()
                new = self.cache / f"{entry.name}.new"
                download(str(self.place).replace("{name}", entry.name), str(new))
                if (new.stat().st_size, sha256(new)) != (entry.size, entry.sha256):
                    new.unlink()
                    raise ValueError("it is not the shard that the index describes")
                new.rename(path)
        return path
