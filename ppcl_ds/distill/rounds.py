"""Rounds: every rank of a pipe group runs the teacher once, tensors change hands, each stage trains on all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ppcl_ds.distill.exchange import Exchange
from ppcl_ds.distill.library import Inbox
from ppcl_ds.families.anatomy import Anatomy, Capture
from ppcl_ds.families.reader import NoisyBatch
from ppcl_ds.planning.plan import Plan
from ppcl_ds.units.depth import Parcel


def parcels_of(capture: Capture, text_mask: Tensor | None, plan: Plan, anatomy: Anatomy) -> dict[str, Parcel]:
    """What every unit of the plan needs from one teacher forward (references to the recorded tensors)."""
    parcels = {}
    for unit in plan.units:
        first, last = (anatomy.blocks[index] for index in unit.span)
        parcels[unit.name] = Parcel(
            inputs=capture.streams[first.entering],
            conditioning=capture.conditioning[first.index],
            targets={stream: capture.streams[last.leaving][stream] for stream in unit.streams},
            text_mask=text_mask,
        )
    return parcels


class Rounds:
    """The iterator that the students' engine pulls its micro-batches from.

    Pulling the first micro-batch of a round runs the teacher and the exchange, so all ranks must pull alike, which the
    engine's schedule does. Memory holds one round, whatever the number of micro-batches in a step.

    Args:
        batches: this rank's share of the numbered micro-batches.
        forward: runs the teacher on a micro-batch; collective over all ranks.
        inbox: where the micro-batch's parcels are laid for the units.
    """

    def __init__(
        self,
        batches: Iterator[tuple[int, NoisyBatch]],
        forward: Callable[[NoisyBatch], Mapping[str, Parcel]],
        exchange: Exchange,
        inbox: Inbox,
        device: torch.device,
    ) -> None:
        self.batches, self.forward, self.exchange, self.inbox = batches, forward, exchange, inbox
        self.waiting: deque[Mapping[str, Parcel]] = deque()
        self.start = torch.zeros((), device=device)

    def __iter__(self) -> Rounds:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Lay out the next micro-batch; returns the running loss it starts from, and a label that nobody reads."""
        if not self.waiting:
            _, batch = next(self.batches)
            self.waiting.extend(self.exchange(self.forward(batch)))
        self.inbox.parcels = self.waiting.popleft()
        return self.start, self.start
