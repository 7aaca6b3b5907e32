"""A linear probe from streamed sums over `torch.linalg.lstsq` on stored activations: seconds and memory as tokens grow.

    python -m benchmarks.probe [--json FILE] [--quick]

Both sides get the same micro-batches of bf16 tokens and end with the same probe, in float64. Ours also sums what the
figures of a span of two blocks need; lstsq has the probe alone. Seconds are those that the one thread computed, without
making the micro-batches, which is the teacher's part; memory is what each side adds to the process that makes them.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
import typer
from torch import Tensor

from benchmarks.load import MIB, Sampler
from benchmarks.table import JsonFile, Quick, Row, row_of_pairs, show
from ppcl_ds.probing.linear import Moments, fit_probe
from ppcl_ds.probing.sums import BlockSums, Lane

MICRO_BATCH = 2048
"""Tokens of a micro-batch."""
spent: list[float] = []
"""Seconds that making micro-batches took in this process."""
Probe = tuple[Tensor, Tensor]
"""Weight (C, C) and bias (C,)."""


def micro_batches(tokens: int, channels: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, tokens entering and tokens leaving a block, (N, C) each, bf16; counts the seconds that this takes."""
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(0)) / channels**0.5
    for number in range(tokens // MICRO_BATCH):
        began = time.thread_time()
        generator = torch.Generator().manual_seed(1 + number)
        before = torch.randn(MICRO_BATCH, channels, generator=generator)
        after = (before + (before @ mixing).tanh()).bfloat16()
        spent.append(time.thread_time() - began)
        yield number, before.bfloat16(), after


def streamed(tokens: int, channels: int) -> Probe:
    """The probe of a block after one exit, from the sums of both halves."""
    lane, device = Lane("image", 0, 2, channels), torch.device("cpu")
    first, second = (BlockSums.zero(lane, block, 2, device) for block in range(2))
    for number, before, after in micro_batches(tokens, channels):
        first.add(number, before, [before, after])
        second.add(number, before, [after])
    moments = first.moments.sum(0)
    sums = Moments(moments[0], moments[1], first.totals.sum(0), second.totals.sum(0), float(first.tokens.sum()))
    probe = fit_probe(sums, 0.0)
    return probe.weight, probe.bias


def stored(tokens: int, channels: int) -> Probe:
    """The same by least squares on everything at once, in float64."""
    x = torch.ones(tokens, channels + 1, dtype=torch.float64)
    y = torch.empty(tokens, channels, dtype=torch.float64)
    for number, before, after in micro_batches(tokens, channels):
        rows = slice(number * MICRO_BATCH, (number + 1) * MICRO_BATCH)
        x[rows, :channels], y[rows] = before, after  # as a map of the whole output, like ours
    solution = torch.linalg.lstsq(x, y).solution
    return solution[:channels], solution[channels]


def _measure(side: Callable[[int, int], Probe], tokens: int, channels: int, answer: Connection) -> None:
    torch.set_num_threads(1)
    side(MICRO_BATCH, 32)  # libraries are loaded, pools are filled
    for _ in micro_batches(2 * MICRO_BATCH, channels):
        pass
    spent.clear()
    sampler, began = Sampler(), time.thread_time()
    weight, bias = side(tokens, channels)
    seconds = time.thread_time() - began - sum(spent)
    answer.send((seconds, sampler.growth()["RssAnon"] / MIB, weight.numpy(), bias.numpy()))


class Measured(NamedTuple):
    """What one side took, and its probe."""

    seconds: float
    mib: float
    probe: Probe


def measure(side: Callable[[int, int], Probe], tokens: int, channels: int) -> Measured:
    """One side in a fresh process with one thread."""
    ours, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(side, tokens, channels, its))
    process.start()
    its.close()
    seconds, mib, weight, bias = ours.recv()
    process.join()
    return Measured(seconds, mib, (torch.from_numpy(weight), torch.from_numpy(bias)))


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Compare time and memory at growing numbers of tokens."""
    channels, repeats = (128, 1) if quick else (384, 3)
    counts = [8192, 32768] if quick else [4096, 16384, 65536, 262144]
    seconds: list[Row] = []
    memory: list[Row] = []
    for tokens in counts:
        pairs = [[measure(side, tokens, channels) for side in (streamed, stored)] for _ in range(repeats)]
        apart = max(float((a - b).abs().max()) for a, b in zip(*(side.probe for side in pairs[0]), strict=True))
        note = f"{channels} channels; the probes differ by at most {apart:.0e}"
        name = f"{tokens:,} tokens: streamed / lstsq"
        ours, other = ([pair[side] for pair in pairs] for side in (0, 1))
        times = [each.seconds for each in ours], [each.seconds for each in other]
        sizes = [each.mib for each in ours], [each.mib for each in other]
        seconds.append(row_of_pairs(f"time, {name}", *times, "s", note))
        memory.append(row_of_pairs(f"memory, {name}", *sizes, "MiB", note))
    show("Linear probes", [*seconds, *memory], json)


if __name__ == "__main__":
    typer.run(main)
