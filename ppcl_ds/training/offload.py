"""Where the optimizer's part of a training lies in CPU memory: pinned, and on its way while others are computed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor


class Offload:
    """Gradients on their way to CPU memory, and parameters on their way back, part by part.

    Each part's gradient is copied while the next one's is averaged; each part is stepped while the gradients behind it
    arrive, and the parameters before it leave. The host waits for a gradient, and for nothing else. On the CPU all of
    this is copies.

    Args:
        masters: float32, of each part (N,); copied into pinned memory, see `masters`.
        parameters: this replica's share of each part on the accelerator, (N,), in the run's dtype.
    """

    def __init__(self, masters: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self.accelerator: Any = get_accelerator()
        self.parameters = parameters
        self.masters = [self._pinned(master, torch.float32).copy_(master).requires_grad_() for master in masters]
        self.gradients = [self._pinned(master, torch.float32) for master in masters]
        self.leaving = [self._pinned(own, own.dtype) for own in parameters]
        queues = self.accelerator.Stream is not None
        self.stream = self.accelerator.Stream() if queues else None
        self.arrived = [self.accelerator.Event() if queues else None for _ in masters]

    def _pinned(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return self.accelerator.pin_memory(torch.empty(like.shape, dtype=dtype))

    def _aside(self) -> AbstractContextManager[Any]:
        """On the stream of the copies, once what the accelerator has been told so far is done."""
        if self.stream is not None:
            self.stream.wait_stream(self.accelerator.current_stream())
        return self.accelerator.stream(self.stream)

    @torch.no_grad()
    def fetch(self, part: int, gradient: Tensor) -> None:
        """Send a part's gradient (N,) here."""
        with self._aside():
            self.gradients[part].copy_(gradient, non_blocking=True)
            if (event := self.arrived[part]) is not None:
                event.record(self.stream)

    def gradient(self, part: int) -> Tensor:
        """A part's gradient (N,), once it is here."""
        if (event := self.arrived[part]) is not None:
            event.synchronize()
        return self.gradients[part]

    @torch.no_grad()
    def send(self, part: int) -> None:
        """Send a part's parameters, rounded from its master, back to the accelerator."""
        self.leaving[part].copy_(self.masters[part])
        with self._aside():
            self.parameters[part].copy_(self.leaving[part], non_blocking=True)

    def wait(self) -> None:
        """Have the accelerator wait for what is under way before it computes more."""
        if self.stream is not None:
            self.accelerator.current_stream().wait_stream(self.stream)
