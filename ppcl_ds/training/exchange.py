"""The exchange: from "all boundaries of my micro-batch" to "my units' boundaries of every micro-batch of the group".

Each rank of a pipe group has run the teacher on a micro-batch of its own. One collective a rank sends every stage the
tensors that its units read, each tensor once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.units.unit import UnitBatch

_ALIGNMENT = 16
"""Bytes; every tensor starts at a multiple, so that it can be viewed in place as its own type."""


@dataclass(frozen=True)
class _Place:
    """A tensor's place in the table of a message."""

    index: int


@dataclass(frozen=True)
class _Layout:
    """Everything about a message but its bytes.

    Attributes:
        leaves: the batches' leaves; tensors stand as places in the table.
        tensors: shape and dtype of each tensor in the table.
        sizes: bytes that each takes in the message.
    """

    leaves: list[Any]
    tensors: list[tuple[torch.Size, torch.dtype]]
    sizes: list[int]


class Exchange:
    """The exchange inside one pipe group.

    Args:
        group: the pipe group; its ranks are the stages in order. Every one of them must make every call.
        cpu_group: the same ranks as a gloo group. Shapes and dtypes go from CPU to CPU, so that no accelerator is
            waited for.
        stage: this rank's stage.
        units: for each stage, the names of its units.
        together: whether everything has to arrive before anything of it is used. Then all send at once, and each
            network card is busy; else one after the other, so that the first messages are there early.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        cpu_group: dist.ProcessGroup,
        stage: int,
        units: Sequence[Sequence[str]],
        together: bool,
    ) -> None:
        self.group, self.cpu_group, self.stage, self.units = group, cpu_group, stage, units
        every = range(len(units))
        self.flights = [every] if together else [range(sender, sender + 1) for sender in every]
        """Whose messages go in one collective; all ranks start them in this order."""

    def __call__(self, batches: Mapping[str, UnitBatch]) -> Iterator[dict[str, UnitBatch]]:
        """Send and receive one round.

        Everything is under way when this returns; each micro-batch is waited for only when its turn comes, so that on
        CUDA the later ones travel while the units train on the earlier ones.

        Args:
            batches: from this rank's teacher forward, one for every unit of the library.

        Returns:
            For each rank of the group in order, on every stage alike, the batches of this stage's units from its
            micro-batch: so a unit's gradients are summed in one order, whichever stage it lies on.
        """
        own = {name: batches[name] for name in self.units[self.stage]}
        if len(self.units) == 1:
            return iter([own])
        # What stays here is not sent.
        messages = [self._pack(batches, names if i != self.stage else []) for i, names in enumerate(self.units)]
        layouts: list[list[_Layout]] = [[] for _ in self.units]
        dist.all_gather_object(layouts, [layout for layout, _ in messages], group=self.cpu_group)
        incoming = [sent[self.stage] for sent in layouts]
        outgoing, sizes = [tensors for _, tensors in messages], [sum(layout.sizes) for layout in incoming]
        pending = {
            sender: arriving
            for flight in self.flights
            for sender, arriving in self._launch(flight, outgoing, sizes).items()
        }
        return self._arrivals(own, incoming, pending)

    def _launch(
        self, senders: range, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[int]
    ) -> dict[int, tuple[dist.Work, Tensor]]:
        """Start sending what these ranks have for the others.

        Args:
            outgoing: from this rank, the tensors for each.
            incoming: bytes that come from each.

        Returns:
            For each sender, the handle, and where this rank's share will lie.
        """
        mine = outgoing if self.stage in senders else [[] for _ in outgoing]
        sizes = [sum(map(_padded, tensors)) for tensors in mine]
        device = get_accelerator().current_device_name()
        send = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        start = 0
        for tensor in (tensor for tensors in mine for tensor in tensors):
            stop = start + tensor.nbytes
            send[start:stop].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            start += _padded(tensor)
        expected = [size if rank in senders else 0 for rank, size in enumerate(incoming)]
        receive = send.new_empty(sum(expected))
        work = dist.all_to_all_single(receive, send, expected, sizes, group=self.group, async_op=True)
        assert work is not None
        shares = receive.split(expected)
        return {sender: (work, shares[sender]) for sender in senders}

    def _arrivals(
        self, own: dict[str, UnitBatch], layouts: Sequence[_Layout], pending: Mapping[int, tuple[dist.Work, Tensor]]
    ) -> Iterator[dict[str, UnitBatch]]:
        # The structure of the batches is the same on every rank, so this rank's own serves to read the others'.
        structure = pytree.tree_structure({name: vars(batch) for name, batch in own.items()})
        for sender, layout in enumerate(layouts):
            work, receive = pending[sender]
            work.wait()
            yield own if sender == self.stage else self._unpack(structure, layout, receive)

    def _pack(self, batches: Mapping[str, UnitBatch], names: Sequence[str]) -> tuple[_Layout, list[Tensor]]:
        table: dict[int, tuple[int, Tensor]] = {}  # identity -> place, tensor: what units share travels once
        leaves: list[Any] = []
        for leaf in pytree.tree_leaves({name: vars(batches[name]) for name in names}):
            if isinstance(leaf, Tensor):
                place, _ = table.setdefault(id(leaf), (len(table), leaf))
                leaf = _Place(place)
            leaves.append(leaf)
        tensors = [tensor for _, tensor in table.values()]
        kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
        return _Layout(leaves, kinds, [_padded(tensor) for tensor in tensors]), tensors

    def _unpack(self, structure: pytree.TreeSpec, layout: _Layout, received: Tensor) -> dict[str, UnitBatch]:
        pieces = received.split(layout.sizes)
        tensors = [
            piece[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for piece, (shape, dtype) in zip(pieces, layout.tensors, strict=True)
        ]
        leaves = [tensors[leaf.index] if isinstance(leaf, _Place) else leaf for leaf in layout.leaves]
        return {name: UnitBatch(**fields) for name, fields in pytree.tree_unflatten(leaves, structure).items()}


def _padded(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a message."""
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
