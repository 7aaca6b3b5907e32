"""Units that a process borrows from the one that trains them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ppcl_ds.units import plugging


class Scaled(nn.Module):
    """A block with everything that one may hold: parameters, and buffers that are saved or are not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("gate", torch.ones(3))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def free_calibration(self) -> None:
        """As units have it."""


def test_a_place_for_a_unit_has_room_for_its_buffers_too() -> None:
    """Of an empty unit they have a shape alone, which cannot be moved to a device."""
    behaviour = SimpleNamespace(empty=lambda *_: Scaled().to("meta"))
    unit: Any = SimpleNamespace(behaviour=behaviour)
    found = plugging._place_for(unit, teacher=None, dtype=torch.float32, device=torch.device("cpu"))  # type: ignore[arg-type]
    shapes = {name: tuple(tensor.shape) for name, tensor in (*found.named_parameters(), *found.named_buffers())}
    assert shapes == {"linear.weight": (3, 2), "linear.bias": (3,), "gate": (3,), "table": (2,)}
    assert {tensor.device.type for tensor in (*found.parameters(), *found.buffers())} == {"cpu"}
    assert list(found.state_dict()) == ["gate", "linear.weight", "linear.bias"]
