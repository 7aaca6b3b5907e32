"""How long stages stand idle: the plain loop of the local phase against DeepSpeed's 1F1B, from traces of their passes.

    python -m benchmarks.schedule [--json FILE] [--quick]

Four stages, one rank each, as many micro-batches as stages. Computing is waiting here: a forward sleeps, a backward
sleeps twice as long, so that the ranks do not fight for the cores of this machine and what is seen is the schedule's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass
from torch import Tensor

from benchmarks.ranks import run_ranks
from benchmarks.table import JsonFile, Quick, Row, row_of_pairs, show
from benchmarks.workload import Workload, prepare
from ppcl_ds.recipe import load_recipe
from ppcl_ds.units.unit import UnitBatch

STAGES = 4
Fed = Iterator[Mapping[str, UnitBatch]]
Spans = list[tuple[float, float]]
"""When passes began and ended, seconds."""


def plain_loop(trainer: Any, fed: Fed, unit_seconds: float) -> tuple[Callable[[], None], Spans]:
    """The product's own step over micro-batches that are there already, of a new library; and its spans."""
    trainer.engine, _ = trainer.build()
    trainer.arrivals = lambda batches: islice(fed, STAGES)
    spans: Spans = []
    for layer in trainer.library.layers:
        layer.loss = sleeping(layer.loss, unit_seconds, spans)
    trainer.engine.accumulate = sleeping(trainer.engine.accumulate, 2 * unit_seconds, spans)
    return partial(trainer.step, iter(())), spans


def one_forward_one_backward(trainer: Any, fed: Fed, unit_seconds: float) -> tuple[Callable[[], None], Spans]:
    """The same by DeepSpeed's schedule: a loss runs from stage to stage, and each adds those of its units."""
    engine, _ = trainer.build()
    layers = trainer.library.layers

    def forward(running: Tensor) -> Tensor:
        arrived = next(fed)
        return running + torch.stack([layer.loss(arrived[layer.name]) for layer in layers]).sum()

    trainer.library.forward = forward
    nothing = torch.zeros(())
    return partial(engine.train_batch, repeat((nothing, nothing))), trace(engine, unit_seconds)


def trace(engine: Any, unit_seconds: float) -> Spans:
    """Have the passes of DeepSpeed's schedule sleep, and note when each began and ended."""
    spans: Spans = []
    passes = engine._INSTRUCTION_MAP
    engine._INSTRUCTION_MAP = passes | {
        ForwardPass: sleeping(passes[ForwardPass], unit_seconds, spans),
        BackwardPass: sleeping(passes[BackwardPass], 2 * unit_seconds, spans),
    }
    return spans


def sleeping(run: Callable[..., Any], seconds: float, spans: Spans) -> Callable[..., Any]:
    """A pass that sleeps first, and notes when it began and ended."""

    def slept(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        time.sleep(seconds)
        found = run(*arguments, **options)
        spans.append((began, time.perf_counter()))
        return found

    return slept


def idle_shares(recipe: str, unit_seconds: float, repeats: int) -> list[list[float]]:
    """Idle share of this rank in each step of the loop and of 1F1B; a rank's task."""
    from ppcl_ds import launch
    from ppcl_ds.distill.distill import check
    from ppcl_ds.distill.trainer import Trainer

    launch.join()
    loaded = load_recipe(Path(recipe))
    teacher, plan = check(loaded)
    trainer = Trainer(loaded, plan, teacher)
    fed = [dict(arrived) for arrived in trainer.arrivals(trainer.batches(0))]
    # 1F1B first: the loop's step is the trainer's, which takes the newest library.
    stock = one_forward_one_backward(trainer, cycle(fed), unit_seconds)
    local = plain_loop(trainer, cycle(fed), unit_seconds)
    shares: list[list[float]] = [[], []]
    for number in range(repeats + 1):
        for own, (step, spans) in zip(shares, (local, stock), strict=True):
            spans.clear()
            dist.barrier()
            step()
            # From when the first rank begins to compute to when the last one ends.
            ends = torch.tensor([-min(begin for begin, _ in spans), max(end for _, end in spans)], dtype=torch.float64)
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
            if number:  # the first one makes groups and buffers
                own.append(1 - sum(end - begin for begin, end in spans) / float(ends.sum()))
    launch.leave()
    return shares


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Compare the idle shares of the loop and of 1F1B."""
    repeats, unit_seconds = (2, 0.1) if quick else (6, 0.2)
    work = Workload(8, 64, micro_batch=1, micro_batches=STAGES, stages=STAGES)
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare(Path(folder), work, {"half": [(0, 1), (2, 3), (4, 5), (6, 7)]})
        arguments: dict[str, Any] = {"recipe": str(recipe), "unit_seconds": unit_seconds, "repeats": repeats}
        ranks = run_ranks("benchmarks.schedule:idle_shares", STAGES, **arguments)
    local, stock = ([sum(each) / STAGES for each in zip(*(rank[i] for rank in ranks), strict=True)] for i in (0, 1))
    note = (
        f"share of the time from the first forward's begin to the last backward's end that a stage spends in neither, "
        f"mean over stages; a forward takes {unit_seconds:g} s; 1F1B in theory "
        f"{(STAGES - 1) / (2 * STAGES - 1):.3f}"
    )
    rows: list[Row] = [
        row_of_pairs(f"idle, {STAGES} stages, {STAGES} micro-batches: ours / 1F1B", local, stock, "share", note)
    ]
    show("The schedule", rows, json)


if __name__ == "__main__":
    typer.run(main)
