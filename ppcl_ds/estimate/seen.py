"""What encoded shards say of a run's samples: how many they are, their size, and how long their captions are."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import prod

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.index import ShardEntry, split_entries
from ppcl_ds.data.shards import BadSampleError, Shards
from ppcl_ds.data.stored import Stored
from ppcl_ds.data.stream import read_texts
from ppcl_ds.data.text import Joining
from ppcl_ds.errors import UserError
from ppcl_ds.sections import Data

_LOOKED = 32
"""Samples that are read."""


@dataclass(frozen=True)
class Seen:
    """Encoded samples that training reads.

    Attributes:
        samples: how many there are.
        bytes: of their shards.
        size: of the largest.
        prompt: the longest of those that were read.
        looked: how many were.
        joining: how captions are joined.
    """

    samples: int
    bytes: int
    size: Size
    prompt: Prompt
    looked: int
    joining: Joining


def look(data: Data) -> Seen | None:
    """Look at some samples of the largest shape in the index; None where none can be read."""
    with suppress(UserError, BadSampleError, ValueError):
        if data.address:
            return None  # which would be fetched whole
        entries = split_entries(data, "train")
        shards, numbers = Shards(entries, data.shards / "encoded"), _largest(entries)
        read = [Stored.read(shards.read(number)[1]["safetensors"]) for number in numbers]
        longest = max(read, key=lambda sample: sum(tensor.numel() for tensor in sample.prompts[""].tensors()))
        samples, size = len(shards), sum(entry.size for entry in entries)
        return Seen(samples, size, longest.size, longest.prompts[""], len(read), read_texts(data).joining)
    return None


def _largest(entries: list[ShardEntry]) -> list[int]:
    """Numbers of the first samples of the shape with most values."""
    shapes = {shape for entry in entries for shape in entry.shapes}
    most = max(shapes, key=lambda shape: prod(int(side) or 1 for side in shape.split("x")))
    first, numbers = 0, []
    for entry in entries:
        numbers += [first + number for number in entry.shapes.get(most, [])]
        first += entry.samples
    return numbers[:_LOOKED]
