"""A safetensors file that is written piece by piece from copies in CPU memory, with a sign of life after each.

The library's own writer takes all tensors at once, and says nothing until the last byte is out; the disk may then take
minutes more to write out what the operating system holds back. Copies are pinned, so that the host does not wait for
them, and lie in pieces: torch's allocator of such memory takes the next power of two of bytes for each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

_PIECE = 64 * 2**20
"""Bytes of a copy, and that are on the disk before the next ones are written; a power of two."""

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
"""Of what checkpoints hold, as the format names them."""


@dataclass(frozen=True)
class Copied:
    """A tensor's bytes in CPU memory, once the accelerator has done what it has been told so far.

    Attributes:
        pieces: uint8, of `_PIECE` bytes each but for the last.
    """

    dtype: torch.dtype
    shape: torch.Size
    pieces: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@torch.no_grad()
def copied(tensor: Tensor) -> Copied:
    """A copy of a tensor of any device; it may still be under way when this returns."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    pieces = []
    for part in flat.split(_PIECE):
        piece = torch.empty(part.shape, dtype=torch.uint8)
        piece = piece if tensor.device.type == "cpu" else get_accelerator().pin_memory(piece)
        pieces.append(piece.copy_(part, non_blocking=True))
    return Copied(tensor.dtype, tensor.shape, tuple(pieces))


def write_tensors(tensors: Mapping[str, Copied], path: Path, alive: Callable[[], None]) -> None:
    """Write copies that have arrived.

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
        for piece in (piece for tensor in tensors.values() for piece in tensor.pieces):
            _write(file, memoryview(piece.numpy().data), alive)


def _write(file: BinaryIO, content: memoryview, alive: Callable[[], None]) -> None:
    for start in range(0, len(content), _PIECE):
        piece = content[start : start + _PIECE]
        while piece:  # a call may write less than it was given
            piece = piece[file.write(piece) :]
        os.fdatasync(file.fileno())
        alive()
