"""Watchdog: a run in which nothing moves ends by itself, and names the rank that the others were waiting for."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from ppcl_ds import reporting

PATIENCE = 5
"""Heartbeats that the thread of a living rank writes while it is watched; one of them has to be seen."""


class Watchdog:
    """A heartbeat of every rank, with its step and phase; when nothing moves for too long, the one that lags is named.

    All ranks make one and enter it together. A thread of each writes into the rendezvous store, which is reached even
    where the rank itself hangs in a collective; a rank whose own place has not changed within the time-out compares
    everybody's, names the one furthest behind, and ends its process; the launcher then ends the others.

    Args:
        timeout: seconds.
        folder: where a rank that ends leaves what NCCL remembers of its last collectives, if it remembers any (see
            `TORCH_FR_BUFFER_SIZE`): `flight_recorder_RANK`, for `torchfrtrace`.
    """

    def __init__(self, timeout: float, folder: Path | None = None) -> None:
        self.folder = folder
        self.timeout, self.rank, self.world = timeout, dist.get_rank(), dist.get_world_size()
        self.step, self.phase, self.places = 0, "start", 0
        """Where this rank is, and how many places it has been at."""
        self.beats = 0
        self.moved = time.monotonic()
        self.over = threading.Event()
        # A connection of its own: the process group's may be busy with what hangs.
        self.host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store may outlive the ranks
        self.store = dist.PrefixStore(f"stall/{start}", dist.TCPStore(self.host, port, is_master=False))
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def on_phase(self, phase: str) -> None:
        self.phase = phase
        self.alive()

    def alive(self) -> None:
        """This rank gets on with its phase; to be called within the time-out, however long a phase is."""
        self.places += 1
        self.moved = time.monotonic()

    def __enter__(self) -> Watchdog:
        self._publish()
        dist.barrier()
        self.alive()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self.thread.join()

    @property
    def _overdue(self) -> bool:
        return not self.over.is_set() and time.monotonic() - self.moved > self.timeout

    def _publish(self) -> None:
        self.beats += 1
        place = {"step": self.step, "phase": self.phase, "places": self.places, "host": socket.gethostname()}
        self.store.set(str(self.rank), json.dumps(place | {"beat": self.beats}))

    def _read(self) -> dict[int, dict[str, Any]]:
        return {rank: json.loads(self.store.get(str(rank))) for rank in range(self.world)}

    def _watch(self) -> None:
        interval = min(1.0, self.timeout / 10)
        while not self.over.wait(interval):
            try:
                self._publish()
                if self._overdue:
                    self._name_the_last(interval)
            except dist.DistError:
                # The run may do without the store for now; only a rank that stands still as well is lost.
                if self._overdue:
                    self._end(f"{self._here()}, and the rendezvous store on {self.host} does not answer")

    def _name_the_last(self, interval: float) -> None:
        before = self._read()
        for _ in range(PATIENCE):
            if self.over.wait(interval):
                return
            self._publish()  # this rank may be watched by another just now
        now = self._read()
        if not self._overdue:
            return
        if self.store.add("verdicts", 1) > 1:
            self._end("")  # another rank has said it
        silent = [r for r in now if r != self.rank and now[r]["beat"] == before[r]["beat"]]
        least = min(place["places"] for place in now.values())
        last = silent or [r for r in now if now[r]["places"] == least]
        if len(last) == self.world:
            self._end(f"every rank: {self._here()}")
        self._end("; ".join(self._words(rank, now[rank], rank in silent) for rank in last))

    def _words(self, rank: int, place: dict[str, Any], silent: bool) -> str:
        state = "does not answer" if silent else "stands still"
        return (
            f"rank {rank} on {place['host']} {state} in phase '{place['phase']}' of step {place['step']}; "
            f"the others have waited for {self.timeout:g} s"
        )

    def _here(self) -> str:
        return f"nothing has moved in phase '{self.phase}' of step {self.step} for {self.timeout:g} s"

    def _end(self, line: str) -> None:
        self._keep_flight_record()
        if line:
            print(f"error: {line}", file=sys.stderr, flush=True)
            reporting.own.fail(f"error: {line}")
        os._exit(1)  # the main thread hangs in a collective and cannot be asked

    def _keep_flight_record(self) -> None:
        """NCCL would write it down itself, at twice this time-out; this process does not live as long."""
        remembered = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)  # where torch has NCCL
        if self.folder is None or remembered is None:
            return
        with suppress(OSError, RuntimeError):  # the verdict must come out, whatever becomes of this
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"flight_recorder_{self.rank}").write_bytes(remembered())
