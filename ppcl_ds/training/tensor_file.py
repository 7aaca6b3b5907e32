"""A safetensors file that is written piece by piece, with a sign of life after each.

The library's own writer takes all tensors at once, on the CPU, and says nothing until the last byte is out; the disk
may then take minutes more to write out what the operating system holds back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_PIECE = 64 * 2**20
"""Bytes that are on the disk before the next ones are written."""

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
"""Of what checkpoints hold, as the format names them."""


def write_tensors(tensors: Mapping[str, Tensor], path: Path, alive: Callable[[], None]) -> None:
    """Write tensors of any device; one of them at a time is copied to the CPU.

    Args:
        alive: called whenever so much more is on the disk.

    Raises:
        OSError: the file system takes no more.
    """
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with path.open("wb", buffering=0) as file:
        _write(file, memoryview(len(words).to_bytes(8, "little") + words), alive)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().flatten()
            _write(file, memoryview(flat.view(torch.uint8).numpy().data), alive)


def _write(file: BinaryIO, content: memoryview, alive: Callable[[], None]) -> None:
    for start in range(0, len(content), _PIECE):
        piece = content[start : start + _PIECE]
        while piece:  # a call may write less than it was given
            piece = piece[file.write(piece) :]
        os.fdatasync(file.fileno())
        alive()
