"""Learned rearrangements: right for what they were learned from, and free of copies to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppcl_ds.teacher.rearrangement import Rearrangement

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "another shape": lambda x: x.reshape(len(x), 6, 4),
    "its first part": lambda x: x[:, :1],
    "its last part": lambda x: x[:, 1:],
    "transposed": lambda x: x.transpose(1, 2),
    "scaled": lambda x: -2 * x,
    "shifted": lambda x: x + 0.5,
    "all of it": lambda x: x.flip(3) * torch.tensor([1.0, 2.0, 3.0, 4.0]) - 1,
}
SHAPE = (2, 3, 4)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_does_what_the_function_does(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    learned = Rearrangement.learn(function, SHAPE, whole=False)
    for samples in (1, 5):
        x = torch.randn(samples, *SHAPE, generator=torch.Generator().manual_seed(samples)).to(dtype)
        assert learned(x).dtype == dtype
        atol = 1e-5 if dtype == torch.float32 else 0.05  # scaled and shifted in its own precision
        torch.testing.assert_close(learned(x), function(x).to(dtype), atol=atol, rtol=0.01)


def test_millions_of_elements_are_told_apart() -> None:
    """As in the latents of a clip, scaled and shifted as a VAE's are, in float32."""
    shape = (16, 21, 60, 104)
    mean, scale = (torch.randn(16, 1, 1, 1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def function(x: Tensor) -> Tensor:
        return x.flip(3) * (scale.abs() + 0.1) + 3 * mean

    learned = Rearrangement.learn(function, shape)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(learned(x), function(x))


@pytest.mark.parametrize("name", ["another shape", "transposed", "all of it"])
def test_there_is_a_way_back(name: str) -> None:
    x = torch.randn(5, *SHAPE)
    learned = Rearrangement.learn(FUNCTIONS[name], SHAPE)
    torch.testing.assert_close(learned.inverse(FUNCTIONS[name](x), SHAPE), x)


@pytest.mark.parametrize(
    ("function", "why"),
    [(lambda x: x + x.flip(1), "mixed"), (lambda x: x * 0, "from nowhere"), (lambda x: x[:, :1], "only a part")],
    ids=["mixed", "lost", "a part"],
)
def test_what_else_is_done_is_refused(function: Callable[[Tensor], Tensor], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Rearrangement.learn(function, SHAPE)


class Copies(TorchDispatchMode):
    """How many tensors change their device or type."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "first"), [("as it is", 0), ("its first part", 0), ("all of it", 3)])
def test_nothing_is_copied_to_the_device_twice(name: str, first: int) -> None:
    """A copy from ordinary memory makes the host wait; where nothing changes its place or value there is none."""
    learned = Rearrangement.learn(FUNCTIONS[name], SHAPE, whole=False)
    for expected in (first, 0):
        with Copies() as copies:
            learned(torch.zeros(1, *SHAPE, dtype=torch.bfloat16, device="meta"))
        assert copies.count == expected
