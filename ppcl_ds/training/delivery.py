"""From the reader to the device: micro-batches are made ready on the CPU and sent before they are needed.

A copy from pinned memory that is not waited for costs the host nothing; one from ordinary memory waits for all that the
device has been given so far. So everything that has to look at numbers is done here, while they are still on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.teacher.noising import NoisyBatch

Sent = TypeVar("Sent")


class Deliveries(Iterator[NoisyBatch]):
    """Micro-batches on the device, in turn; each can be sent while the device is busy with the one before.

    Args:
        batches: on the CPU.
        device: where they are wanted.
        ahead: so many of them, from the first one on, may be sent before they are asked for; later ones are not read
            before somebody wants them.
    """

    def __init__(self, batches: Iterator[NoisyBatch], device: torch.device, ahead: int) -> None:
        self.batches, self.device, self.left = batches, device, ahead
        self.under_way: NoisyBatch | None = None

    def __next__(self) -> NoisyBatch:
        if self.under_way is None:
            return self._sent()
        batch, self.under_way = self.under_way, None
        return batch

    def send_next(self) -> None:
        """Have the next micro-batch on its way; to be called once the device has work to do meanwhile."""
        if self.under_way is None and self.left > 0:
            self.under_way = self._sent()

    def _sent(self) -> NoisyBatch:
        self.left -= 1
        return send(next(self.batches), self.device)


def send(value: Sent, device: torch.device) -> Sent:
    """A tree of tensors, or a dataclass with some, on its way from the CPU to the device; the host does not wait."""

    def sent(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        return get_accelerator().pin_memory(tensor).to(device, non_blocking=True)

    moved: Any = pytree.tree_map_only(Tensor, sent, value)
    if is_dataclass(value) and not isinstance(value, type):
        moved = replace(value, **{field.name: send(getattr(value, field.name), device) for field in fields(value)})
    return moved
