"""Rounds: every rank of a pipe group runs the teacher once, tensors change hands, each stage trains on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ppcl_ds.data.noising import NoisyBatch
from ppcl_ds.distill.library import Inbox
from ppcl_ds.training.exchange import Exchange
from ppcl_ds.units.unit import Parcel
from ppcl_ds.watch.timer import Timer


class Rounds:
    """The iterator that the students' engine pulls its micro-batches from.

    Pulling the first micro-batch of a round runs the teacher and the exchange, so all ranks must pull alike, which the
    engine's schedule does. Memory holds one round, whatever the number of micro-batches in a step.

    Args:
        batches: this rank's share of the numbered micro-batches.
        forward: runs the teacher on a micro-batch; collective over all ranks.
        inbox: where the micro-batch's parcels are laid for the units.
        timer: told which phase the time goes to.
    """

    def __init__(
        self,
        batches: Iterator[tuple[int, NoisyBatch]],
        forward: Callable[[NoisyBatch], Mapping[str, Parcel]],
        exchange: Exchange,
        inbox: Inbox,
        timer: Timer,
        device: torch.device,
    ) -> None:
        self.batches, self.forward, self.exchange, self.inbox, self.timer = batches, forward, exchange, inbox, timer
        self.arriving: Iterator[Mapping[str, Parcel]] = iter(())
        self.start = torch.zeros((), device=device)

    def __iter__(self) -> Rounds:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Lay out the next micro-batch; returns the running loss it starts from, and a label that nobody reads."""
        self.inbox.parcels = {}  # let go of the last micro-batch before the next one arrives
        with self.timer.phase("exchange"):
            parcels = next(self.arriving, None)
        if parcels is None:
            with self.timer.phase("data"):
                _, batch = next(self.batches)
            with self.timer.phase("teacher"):
                sent = self.forward(batch)
            with self.timer.phase("exchange"):
                self.arriving = self.exchange(sent)
                parcels = next(self.arriving)
        self.inbox.parcels = parcels
        return self.start, self.start
