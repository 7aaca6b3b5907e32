"""Replay: what the teacher has said stays for a while, and units take several steps on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.sampling import Replay
from ppcl_ds.units.unit import UnitBatch

Arrived = Mapping[str, UnitBatch]
"""Of one micro-batch, what each unit of a stage reads."""


class Ring:
    """The newest readings of the teacher, as they have arrived on this stage.

    Step t (from 0 on) draws one of readings t // uses - ring + 1 ... t // uses by seed and t alone. All of its
    micro-batches are trained on, so every stage and replica takes its part of the same samples, on any topology. After
    a restart the ring is empty, and filled again by the teacher from the numbered samples.

    Args:
        seed: of the draws.
        device: where units are trained.
    """

    def __init__(self, settings: Replay, seed: int, device: torch.device) -> None:
        self.uses, self.seed, self.device = settings.uses, seed, device
        self.size = settings.ring if settings.uses > 1 else 1
        self.copies = _Copies() if settings.offload and device.type != "cpu" else None
        self.kept: dict[int, list[Arrived]] = {}
        self.fetched: dict[tuple[int, int], Arrived] = {}
        """Reading and place of a micro-batch -> it, on its way to the device."""

    def readings(self, done: int, steps: int) -> range:
        """The readings that are needed after `done` of `steps` steps."""
        return range(self._oldest(done), -(-steps // self.uses))

    def _oldest(self, step: int) -> int:
        return max(0, step // self.uses - self.size + 1)

    def drawn(self, step: int) -> int:
        """The reading that a step is taken on."""
        oldest, newest = self._oldest(step), step // self.uses
        draw = np.random.SeedSequence([self.seed, step, newest - oldest + 1]).generate_state(1, np.uint64)[0]
        return oldest + int(draw % np.uint64(newest - oldest + 1))

    def members(self, step: int, read: Callable[[], Iterator[dict[str, UnitBatch]]]) -> Iterator[Arrived]:
        """The micro-batches of a step, after whatever the teacher has to read for it; collective over all ranks.

        Args:
            step: how many are done.
            read: has the teacher read the next reading.
        """
        if self.uses == 1:
            yield from read()
            return
        newest = max(self.kept, default=self._oldest(step) - 1)
        for reading in range(newest + 1, step // self.uses + 1):
            self.kept.pop(reading - self.size, None)
            self.kept[reading] = [self._keep(arrived) for arrived in read()]
        yield from self._sent(step)

    def _keep(self, arrived: dict[str, UnitBatch]) -> Arrived:
        return self.copies.to_host(arrived) if self.copies else dict(arrived)

    def _sent(self, step: int) -> Iterator[Arrived]:
        """A step's micro-batches on the device, each on its way while the one before is trained on."""
        reading = self.drawn(step)
        own = self.kept[reading]
        following = self.drawn(step + 1)  # it may have to be read yet
        for place, arrived in enumerate(own):
            if self.copies is None:
                yield arrived
                continue
            here = self.fetched.pop((reading, place), None) or self.copies.to_device(arrived, self.device)
            self.copies.wait(here)
            after = (reading, place + 1) if place + 1 < len(own) else (following, 0)
            if after[0] in self.kept:
                self.fetched[after] = self.copies.to_device(self.kept[after[0]][after[1]], self.device)
            yield here


class _Copies:
    """Between accelerator and pinned CPU memory, on a stream of their own; the host waits for none of them."""

    def __init__(self) -> None:
        self.accelerator = get_accelerator()
        self.stream = self.accelerator.Stream()

    def to_host(self, arrived: Arrived) -> Arrived:
        """Copies in pinned memory, once what is under way on the device has been computed."""
        self.stream.wait_stream(self.accelerator.current_stream())

        def copied(tensor: Tensor) -> Tensor:
            host = self.accelerator.pin_memory(torch.empty(tensor.shape, dtype=tensor.dtype))
            tensor.record_stream(self.stream)  # its memory is not given away before
            return host.copy_(tensor, non_blocking=True)

        with self.accelerator.stream(self.stream):
            return _mapped(copied, arrived)

    def to_device(self, arrived: Arrived, device: torch.device) -> Arrived:
        """Copies on the device, under way; see `wait`."""
        with self.accelerator.stream(self.stream):
            return _mapped(lambda tensor: tensor.to(device, non_blocking=True), arrived)

    def wait(self, arrived: Arrived) -> None:
        """Have the device wait for what is under way before it computes more."""
        current = self.accelerator.current_stream()
        current.wait_stream(self.stream)
        for tensor in _tensors(arrived):
            tensor.record_stream(current)


def _tensors(arrived: Arrived) -> Iterable[Tensor]:
    leaves = pytree.tree_leaves([vars(batch) for batch in arrived.values()])
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))


def _mapped(function: Callable[[Tensor], Tensor], arrived: Arrived) -> Arrived:
    """With another tensor in each one's place; what units share stays shared."""
    made: dict[int, Tensor] = {}

    def mapped(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = function(tensor)
        return made[id(tensor)]

    return {name: UnitBatch(**pytree.tree_map_only(Tensor, mapped, vars(batch))) for name, batch in arrived.items()}
