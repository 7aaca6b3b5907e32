"""The exchange: from "all boundaries of my micro-batch" to "my units' boundaries of every micro-batch of the group".

Each rank of a pipe group has run the teacher on a micro-batch of its own. One collective sends every stage the tensors
that its units read, each tensor once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.units.depth import Parcel

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
        leaves: the parcels' leaves; tensors stand as places in the table.
        tensors: shape and dtype of each tensor in the table.
    """

    leaves: list[Any]
    tensors: list[tuple[torch.Size, torch.dtype]]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor, padded to the alignment."""
        return [-(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape, dtype in self.tensors]


class Exchange:
    """The exchange inside one pipe group.

    Args:
        group: the pipe group; its ranks are the stages in order. Every one of them must make every call.
        stage: this rank's stage.
        units: for each stage, the names of its units.
    """

    def __init__(self, group: dist.ProcessGroup, stage: int, units: Sequence[Sequence[str]]) -> None:
        self.group, self.stage, self.units = group, stage, units

    def __call__(self, parcels: Mapping[str, Parcel]) -> list[dict[str, Parcel]]:
        """Send and receive one round.

        Args:
            parcels: from this rank's teacher forward, one for every unit of the library.

        Returns:
            For each rank of the group in order, the parcels of this stage's units from its micro-batch.
        """
        if len(self.units) == 1:
            return [dict(parcels)]
        messages = [self._pack(parcels, names) for names in self.units]
        layouts: list[list[_Layout]] = [[] for _ in self.units]
        dist.all_gather_object(layouts, [layout for layout, _ in messages], group=self.group)
        incoming = [sent[self.stage] for sent in layouts]
        received = self._swap([tensors for _, tensors in messages], [sum(layout.sizes) for layout in incoming])
        # The structure of the parcels is the same on every rank, so this rank's own serves to read the others'.
        structure = pytree.tree_structure({name: vars(parcels[name]) for name in self.units[self.stage]})
        return [self._unpack(structure, *pair) for pair in zip(incoming, received, strict=True)]

    def _pack(self, parcels: Mapping[str, Parcel], names: Sequence[str]) -> tuple[_Layout, list[Tensor]]:
        table: dict[int, tuple[int, Tensor]] = {}  # identity -> place, tensor: what units share travels once
        leaves: list[Any] = []
        for leaf in pytree.tree_leaves({name: vars(parcels[name]) for name in names}):
            if isinstance(leaf, Tensor):
                place, _ = table.setdefault(id(leaf), (len(table), leaf))
                leaf = _Place(place)
            leaves.append(leaf)
        tensors = [tensor for _, tensor in table.values()]
        return _Layout(leaves, [(tensor.shape, tensor.dtype) for tensor in tensors]), tensors

    def _swap(self, outgoing: Sequence[Sequence[Tensor]], incoming_bytes: list[int]) -> list[Tensor]:
        chunks = [[_bytes_of(tensor) for tensor in tensors] for tensors in outgoing]
        send = torch.cat([chunk for part in chunks for chunk in part])
        receive = send.new_empty(sum(incoming_bytes))
        outgoing_bytes = [sum(len(chunk) for chunk in part) for part in chunks]
        dist.all_to_all_single(receive, send, incoming_bytes, outgoing_bytes, group=self.group)
        return list(receive.split(incoming_bytes))

    def _unpack(self, structure: pytree.TreeSpec, layout: _Layout, received: Tensor) -> dict[str, Parcel]:
        pieces = received.split(layout.sizes)
        tensors = [
            piece[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for piece, (shape, dtype) in zip(pieces, layout.tensors, strict=True)
        ]
        leaves = [tensors[leaf.index] if isinstance(leaf, _Place) else leaf for leaf in layout.leaves]
        return {name: Parcel(**fields) for name, fields in pytree.tree_unflatten(leaves, structure).items()}


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = tensor.detach().resolve_conj().contiguous().view(-1).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -len(flat) % _ALIGNMENT))
