"""Latents in other places, scaled and shifted: learned from a function that does just that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rearrangement:
    """`y = x[index] * scale + shift` over the elements of one sample laid flat.

    Attributes:
        index, scale, shift: (N,), of the elements of y; a scale of zero: it does not come from x.
        shape: of y, without the batch dimension.
    """

    index: Tensor
    scale: Tensor
    shift: Tensor
    shape: torch.Size
    _copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def learn(
        cls, function: Callable[[Tensor], Tensor], shape: Sequence[int], whole: bool = True, constants: bool = False
    ) -> Rearrangement:
        """What a function does to tensors of (1, *shape).

        Args:
            whole: whether all of x must arrive, so that there is a way back.
            constants: whether y may have elements that do not come from x.

        Raises:
            ValueError: it is no rearrangement.
        """
        count = torch.Size(shape).numel()
        # An element's number in two digits: of millions, a number by itself would be lost in rounding.
        base = math.isqrt(count - 1) + 1
        places = torch.arange(count)
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(0))
        given = torch.zeros(count), torch.ones(count), places // base / base, places % base / base, drawn
        zero, one, high, low, other = (function(x.float().reshape(1, *shape))[0].double() for x in given)
        if not zero.numel():
            raise ValueError("nothing of it arrives")
        scale = one - zero
        moved = scale != 0
        if not moved.all() and not constants:
            raise ValueError("some elements are read from nowhere")
        digits = [(digit - zero) / scale.where(moved, 1) * base for digit in (high, low)]
        digits = [digit.round().long().clamp(0, base - 1) for digit in digits]
        index = (digits[0] * base + digits[1]).clamp(max=count - 1)
        if (drawn.double()[index] * scale + zero - other).abs().max() > 1e-4 * other.abs().max().clamp(1):
            raise ValueError("elements are mixed")
        if whole and len(index[moved].unique()) < count:
            raise ValueError("only a part of it arrives")
        return cls(index.flatten(), scale.flatten().float(), zero.flatten().float(), one.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, *shape)."""
        x = x.flatten(1)
        if self._in_order and self._as_they_are:
            return x[:, : len(self.index)].reshape(-1, *self.shape)
        index, scale, shift = self._on(x)
        return (x[:, index] * scale + shift).reshape(-1, *self.shape)

    def put_back(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """(B, *shape of y) -> (B, *shape): the elements where they came from, their values as they are.

        What of x did not arrive in y is zero.
        """
        return self.put_into(y.new_zeros(len(y), *shape), y)

    def put_into(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, ...) with, in a copy of it, the elements of y where they came from, as they are."""
        flat, index, values = x.flatten(1).clone(), self._on(y)[0], y.flatten(1).to(x)
        if self._still is not None:
            moved = ~self._still.to(y.device)
            index, values = index[moved], values[:, moved]
        flat[:, index] = values
        return flat.view_as(x)

    def noise(self, batch: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """(B, *shape) float32, drawn as y is laid out, however x is; then what of x does not arrive in y."""
        x = self.put_back(torch.randn(batch, *self.shape, generator=generator), shape).flatten(1)
        others = torch.ones(x.shape[1], dtype=torch.bool)
        others[self.index if self._still is None else self.index[~self._still]] = False
        x[:, others] = torch.randn(batch, int(others.sum()), generator=generator)
        return x.reshape(-1, *shape)

    def inverse(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """(B, *shape of y) -> (B, *shape)."""
        _, scale, shift = self._on(y)
        return self.put_back(((y.flatten(1) - shift) / scale).view_as(y), shape)

    @cached_property
    def _still(self) -> Tensor | None:
        """Which elements of y do not come from x, (N,) bool; None: all do."""
        return None if self.scale.all() else self.scale == 0

    @cached_property
    def _in_order(self) -> bool:
        return torch.equal(self.index, torch.arange(len(self.index)))

    @cached_property
    def _as_they_are(self) -> bool:
        return bool((self.scale == 1).all() and (self.shift == 0).all())

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Index, scale and shift beside a tensor; kept there, as the host would wait for every copy."""
        key = like.device, like.dtype
        if key not in self._copies:
            scale, shift = (each.to(like.device, like.dtype) for each in (self.scale, self.shift))
            self._copies[key] = self.index.to(like.device), scale, shift
        return self._copies[key]
