"""Timer: where the time of a step goes, phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from deepspeed.utils.timer import SynchronizedWallClockTimer
from torch.utils import benchmark

from ppcl_ds import memory


class Timer:
    """Seconds by phase on this rank, measured by events on the accelerator's stream: measuring waits for nothing.

    Args:
        on_phase: called with the phase's name whenever one begins or is returned to.
    """

    def __init__(self, on_phase: Callable[[str], None]) -> None:
        self.on_phase = on_phase
        self.timers = SynchronizedWallClockTimer()
        self.inside: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time spent inside counts for this phase alone; the one around it stands still meanwhile."""
        if self.inside:
            self.timers(self.inside[-1]).stop()
        self._enter(name)
        try:
            with memory.phase(name):
                yield
        finally:
            self.timers(self.inside.pop()).stop()
            if self.inside:
                self._enter(self.inside.pop())

    def _enter(self, name: str) -> None:
        self.inside.append(name)
        self.on_phase(name)
        self.timers(name).start()

    def drain(self) -> dict[str, float]:
        """Seconds by phase since the last call; between phases."""
        return {name: timer.elapsed(reset=True) / 1000 for name, timer in self.timers.get_timers().items()}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product on this device now: what "its share of the peak" is a share of."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timed = benchmark.Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timed.blocked_autorange(min_run_time=0.1).median
