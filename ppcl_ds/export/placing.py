"""Where models lie while they are used: on the accelerator if they fit; else a part at a time, from CPU memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

_ROOM = 0.85
"""Share of a GPU's memory that weights may take; activations need the rest."""


def usable(device: torch.device) -> float:
    """Bytes that weights may take on a device; the CPU has room for any."""
    return _ROOM * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def size_of(model: nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@contextmanager
def placed(model: nn.Module, device: torch.device, fits: bool) -> Iterator[nn.Module]:
    """The model, ready to be run on a device.

    Args:
        fits: whether all of it; else each layer's weights are there while it computes, and the model is as fast as
            they travel.
    """
    try:
        yield place(model, device, fits)
    finally:
        remove_hook_from_submodules(model)  # which puts the weights back


def place(model: nn.Module, device: torch.device, fits: bool) -> nn.Module:
    """The same for as long as the model lives."""
    if fits:
        return model.to(device)
    cpu_offload(model, execution_device=device)
    return model


def place_pipeline(pipeline: Any, device: torch.device) -> str:
    """Make a stock pipeline ready to draw on a device; what it keeps in CPU memory, in words: nothing if it fits.

    One model after the other is on the device where each of them fits by itself, and one layer after the other where
    one does not.
    """
    sizes = [size_of(model) for model in pipeline.components.values() if isinstance(model, nn.Module)]
    room = usable(device)
    if sum(sizes) <= room:
        pipeline.to(device)
        return ""
    if max(sizes) <= room:
        pipeline.enable_model_cpu_offload(device=device)
        return "models that are not at work"
    pipeline.enable_sequential_cpu_offload(device=device)
    return "all layers but the one at work"
