"""Matrices with one scale each, as ComfyUI's quantised checkpoints have them: fp8 (E4M3) and int8.

By ComfyUI's QUANTIZATION.md: a layer's `weight` is stored quantised, `weight_scale` beside it is a float32 number by
which it is multiplied again, and the file's metadata names the format of each such layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

from ppcl_ds.export.single_files import is_block_matrix
from ppcl_ds.teacher.files import Source, Sources

FORMATS = {"fp8": ("float8_e4m3fn", torch.float8_e4m3fn, 448.0), "int8": ("int8_tensorwise", torch.int8, 127.0)}
"""What users say -> what ComfyUI says, the dtype, the largest number in it."""


def scaled(tensors: Sources, kind: str) -> tuple[Sources, dict[str, str]]:
    """A single file's tensors with the matrices inside its blocks quantised, and the metadata that says so.

    Args:
        kind: of `FORMATS`.
    """
    name_of_format, dtype, largest = FORMATS[kind]
    found: dict[str, Source] = {}
    layers = {}
    for name, source in tensors.items():
        layer = name.removesuffix(".weight")
        if layer == name or not is_block_matrix(name, source):
            found[name] = source
            continue
        found[name] = Source(source.shape, dtype, _quantised(source, dtype, largest))
        found[f"{layer}.weight_scale"] = Source(torch.Size([]), torch.float32, _scale(source, largest))
        layers[layer] = {"format": name_of_format}
    return found, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def _scale_of(weight: Tensor, largest: float) -> Tensor:
    return (weight.abs().amax().float() / largest).clamp(min=torch.finfo(torch.float32).tiny)


def _scale(source: Source, largest: float) -> Callable[[], Tensor]:
    return lambda: _scale_of(source.load(), largest)


def _quantised(source: Source, dtype: torch.dtype, largest: float) -> Callable[[], Tensor]:
    def load() -> Tensor:
        weight = source.load().float()
        weight = (weight / _scale_of(weight, largest)).clamp(-largest, largest)
        return (weight if dtype.is_floating_point else weight.round()).to(dtype)

    return load
