"""Tensors that are described now and loaded later, so that a model of any size can be laid out before it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """One tensor of a model, not loaded yet.

    Attributes:
        shape, dtype: what `load` will return.
        load: reads the tensor onto the CPU; may raise `UserError`.
        unit: name of the unit that it is of; empty for the teacher's own.
    """

    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], Tensor]
    unit: str = ""

    @property
    def bytes(self) -> int:
        """Size of the loaded tensor."""
        return self.shape.numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> Source:
        """The same tensor in another number format, converted when it is loaded."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, load=lambda: self.load().to(dtype))


Sources = Mapping[str, Source]
"""A model, or a part of one: tensor name -> where it comes from, in the order of the model's state dict."""


def held(tensors: Mapping[str, Tensor]) -> dict[str, Source]:
    """Tensors that are in memory already, as sources."""
    return {name: Source(tensor.shape, tensor.dtype, lambda t=tensor: t) for name, tensor in tensors.items()}  # type: ignore[misc]
