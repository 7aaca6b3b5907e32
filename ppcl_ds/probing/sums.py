"""What a probe keeps of the teacher's activations: sums of fixed size that add up over ranks and over array tasks.

Shapes: N tokens, C channels, D exits that one window holds, K minibatches of at most S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ppcl_ds.teacher.anatomy import Anatomy, Capture, Wanted
from ppcl_ds.units.loss import counted

HALVES = 2
"""Micro-batches of even and of odd number: probes fitted on one half are measured on the other."""
MINIBATCHES = 32
"""Of so many micro-batches a sample of tokens is kept,"""
SAMPLED = 64
"""of so many tokens each."""
_AT_ONCE = 8192
"""Tokens that are float64 at a time."""


class Key(NamedTuple):
    """The exit of a block, in one stream."""

    block: int
    stream: str


@dataclass(frozen=True)
class Lane:
    """A stream along the blocks of one run, as far as it matters: chains of probes stay inside a lane.

    Attributes:
        stream: its name.
        start, stop: blocks start, ..., stop - 1.
        channels: C.
    """

    stream: str
    start: int
    stop: int
    channels: int


def lanes_of(anatomy: Anatomy, capture: Capture, unused: Sequence[str]) -> list[Lane]:
    """The lanes of a teacher, from one forward with all boundaries recorded.

    A stream ends where a block does not return it (the text of SD3's last block).

    Args:
        unused: streams that leave the last block unread; they end before it.
    """
    lanes = []
    for blocks in anatomy.runs:
        for stream in blocks[0].returns:
            stop = blocks[0].index
            for block in blocks:
                if stream not in capture.streams[block.leaving] or (block is anatomy.blocks[-1] and stream in unused):
                    break
                stop = block.index + 1
            if stop > blocks[0].index:
                channels = capture.streams[blocks[0].leaving][stream].shape[-1]
                lanes.append(Lane(stream, blocks[0].index, stop, channels))
    return lanes


class BlockSums:
    """Sums at the exit of one block in one stream, and with the exits after it. All tensors simply add up.

    Attributes:
        moments: (2, D, C, C) float64: for each half, h_u^T h_v with v = u, u + 1, ..., u + D - 1.
        totals: (2, C) float64 sums of h_u.
        tokens: (2,) float64 counts.
        cosines: (2,) float64 sums over tokens of the cosine of the block's input and output.
        sample: (K, S, C) float64: tokens of the micro-batches 0, ..., K - 1.
        sampled: (K,) float64: how many each has.
    """

    NAMES = ("moments", "totals", "tokens", "cosines", "sample", "sampled")

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.moments, self.totals, self.tokens, self.cosines, self.sample, self.sampled = (
            tensors[name] for name in self.NAMES
        )

    @staticmethod
    def shapes(lane: Lane, block: int, max_span: int) -> dict[str, tuple[int, ...]]:
        window, channels = min(max_span, lane.stop - block), lane.channels
        return {
            "moments": (HALVES, window, channels, channels),
            "totals": (HALVES, channels),
            "tokens": (HALVES,),
            "cosines": (HALVES,),
            "sample": (MINIBATCHES, SAMPLED, channels),
            "sampled": (MINIBATCHES,),
        }

    @classmethod
    def zero(cls, lane: Lane, block: int, max_span: int, device: torch.device) -> BlockSums:
        shapes = cls.shapes(lane, block, max_span)
        return cls({name: torch.zeros(s, dtype=torch.float64, device=device) for name, s in shapes.items()})

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.NAMES}

    def add(self, number: int, before: Tensor, exits: Sequence[Tensor]) -> None:
        """Add the tokens of one micro-batch.

        Args:
            number: of the micro-batch; says the half, and which tokens are sampled.
            before: (N, C) what entered the block.
            exits: D times (N, C), of blocks u, u + 1, ..., u + D - 1.
        """
        half, after = number % HALVES, exits[0]
        for start in range(0, len(after), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            transposed = after[some].double().T
            for moment, exit_ in zip(self.moments[half], exits, strict=True):
                moment.addmm_(transposed, exit_[some].double())
        self.totals[half] += after.sum(0, dtype=torch.float64)
        self.tokens[half] += len(after)
        self.cosines[half] += F.cosine_similarity(before.double(), after.double(), dim=-1).sum()
        if number < MINIBATCHES:
            # The same places in every block; drawn, because evenly spaced ones would fall into columns of the image.
            drawn = torch.randperm(len(after), generator=torch.Generator().manual_seed(number))[:SAMPLED]
            self.sample[number, : len(drawn)] += after[drawn.to(after.device)].double()
            self.sampled[number] += len(drawn)


Sums = dict[Key, BlockSums]


def block_bytes(lanes: Iterable[Lane], block: int, max_span: int) -> int:
    """Memory of the sums of one block in all its streams."""
    return sum(
        8 * sum(torch.Size(shape).numel() for shape in BlockSums.shapes(lane, block, max_span).values())
        for lane in lanes
        if lane.start <= block < lane.stop
    )


def ranges(
    lanes: Sequence[Lane], max_span: int, blocks_at_once: int | None, most_bytes: int, boundary: int = 0
) -> list[range]:
    """Blocks in ranges, the last first: the sums of one range are in memory at a time.

    Args:
        blocks_at_once: blocks of a range; None: as many as `most_bytes` hold, at least one.
        boundary: bytes of what leaves a block, which are there of the range and of the windows that begin in it.
    """
    found = []
    end = stop = max(lane.stop for lane in lanes)
    while stop > 0:
        start, filled = stop, boundary * min(max_span - 1, end - stop)
        while start > 0 and stop - start != blocks_at_once:
            filled += block_bytes(lanes, start - 1, max_span) + boundary
            if blocks_at_once is None and filled > most_bytes and start < stop:
                break
            start -= 1
        found.append(range(start, stop))
        stop = start
    return found


def pieces(lanes: Iterable[Lane], blocks: range) -> Iterator[tuple[Lane, range]]:
    """The part of each lane that lies in `blocks`."""
    for lane in lanes:
        piece = range(max(lane.start, blocks.start), min(lane.stop, blocks.stop))
        if piece:
            yield lane, piece


def zero_sums(lanes: Iterable[Lane], blocks: range, max_span: int, device: torch.device) -> Sums:
    """Sums of nothing for a range of blocks."""
    return {
        Key(block, lane.stream): BlockSums.zero(lane, block, max_span, device)
        for lane, piece in pieces(lanes, blocks)
        for block in piece
    }


def wanted_for(lanes: Iterable[Lane], blocks: range, max_span: int) -> Wanted:
    """What a teacher forward is run for: the exits of the range and of the windows that begin in it."""
    calls: set[int] = set()
    exits: set[int] = set()
    for lane, piece in pieces(lanes, blocks):
        calls.add(piece.start)
        exits |= set(range(piece.start, min(piece.stop - 1 + max_span, lane.stop)))
    return Wanted(frozenset(calls), frozenset(exits))


def add_capture(
    sums: Sums,
    lanes: Iterable[Lane],
    blocks: range,
    anatomy: Anatomy,
    number: int,
    capture: Capture,
    text_mask: Tensor | None,
) -> None:
    """Add one micro-batch to the sums of a range of blocks.

    Args:
        number: of the micro-batch.
        capture: with what `wanted_for` asks for.
        text_mask: (B, S) bool, True for text tokens that count.
    """
    for lane, piece in pieces(lanes, blocks):
        mask = text_mask if lane.stream == "text" else None

        def tokens(boundary: int, stream: str = lane.stream, mask: Tensor | None = mask) -> Tensor:
            return counted(capture.streams[boundary][stream], mask)

        before = tokens(anatomy.blocks[piece.start].entering)
        for block in piece:
            own = sums[Key(block, lane.stream)]
            exits = [tokens(b.leaving) for b in anatomy.blocks[block : block + own.moments.shape[1]]]
            own.add(number, before, exits)
            before = exits[0]
