"""How long stages stand idle: the schedule without bubbles against DeepSpeed's 1F1B, from traces of instructions.

    python -m benchmarks.schedule [--json FILE] [--quick]

Four stages, one rank each, as many micro-batches as stages. Computing is waiting here: a forward sleeps, a backward
sleeps twice as long, so that the ranks do not fight for the cores of this machine and what is seen is the schedule's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
from ppcl_ds.data.noising import DTYPES
from ppcl_ds.distill.library import Inbox, Library
from ppcl_ds.recipe import Recipe, load_recipe, read_deepspeed_file
from ppcl_ds.training.engine import LocalEngine, StudentsEngine, TrainUnits
from ppcl_ds.units.unit import Parcel

STAGES = 4
Parcels = Sequence[Mapping[str, Parcel]]


class Layout:
    """Lays out parcels that are there already, one micro-batch after the other."""

    def __init__(self, inbox: Inbox, parcels: Parcels) -> None:
        self.inbox, self.parcels = inbox, iter(parcels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        self.inbox.parcels = next(self.parcels)
        return torch.zeros(()), torch.zeros(())


class OneForwardOneBackward(StudentsEngine):
    """The stock schedule, over parcels that every stage lays out when a micro-batch reaches it."""

    def feed(self, layout: Layout) -> None:
        """Give the parcels of the steps to come."""
        self.layout = layout
        self.set_dataiterator(iter(lambda: (torch.zeros(()), torch.zeros(())), None))

    def _exec_forward_pass(self, buffer_id: int) -> None:
        next(self.layout)
        super()._exec_forward_pass(buffer_id)

    _INSTRUCTION_MAP = {**StudentsEngine._INSTRUCTION_MAP, ForwardPass: _exec_forward_pass}  # noqa: RUF012


class WithoutBubbles(LocalEngine):
    """The product's schedule over such parcels."""

    def feed(self, layout: Layout) -> None:
        """Give the parcels of the steps to come."""
        self.set_dataiterator(layout)


def new_engine(kind: type[Any], recipe: Recipe, parcels: Parcels) -> Any:
    """An engine of this kind with a library of its own, fed with these parcels; all ranks together."""
    from ppcl_ds.distill.distill import check

    teacher, plan = check(recipe)
    inbox = Inbox()
    library = Library(
        plan,
        teacher,
        costs={unit.name: 1 for unit in plan.units},
        stages=recipe.topology.stages,
        dtype=DTYPES[recipe.teacher.precision],
        inbox=inbox,
        magnitude_weight=recipe.distill.magnitude_weight,
        checkpointing=recipe.distill.activation_checkpointing,
    )
    students = read_deepspeed_file(recipe.deepspeed.students)
    engine = kind(library, students, recipe.distill, recipe.teacher.precision)
    engine.feed(Layout(inbox, parcels))
    return engine


def trace(engine: Any, unit_seconds: float) -> list[tuple[float, float]]:
    """Have an engine's passes sleep, and note when each began and ended."""
    spans: list[tuple[float, float]] = []
    costs = {ForwardPass: unit_seconds, BackwardPass: 2 * unit_seconds, TrainUnits: 3 * unit_seconds}

    def sleeping(instruction: Any, seconds: float) -> Any:
        def run(self: Any, buffer_id: int) -> None:
            began = time.perf_counter()
            time.sleep(seconds)
            instruction(self, buffer_id=buffer_id)
            spans.append((began, time.perf_counter()))

        return run

    engine._INSTRUCTION_MAP = dict(engine._INSTRUCTION_MAP)
    for kind, seconds in costs.items():
        if kind not in engine._INSTRUCTION_MAP:
            continue
        engine._INSTRUCTION_MAP[kind] = sleeping(engine._INSTRUCTION_MAP[kind], seconds)
    return spans


def idle_shares(recipe: str, unit_seconds: float, repeats: int) -> list[list[float]]:
    """Idle share of this rank in each step of both schedules; a rank's task."""
    from ppcl_ds import launch
    from ppcl_ds.distill.distill import check
    from ppcl_ds.distill.trainer import Trainer

    launch.join()
    loaded = load_recipe(Path(recipe))
    teacher, plan = check(loaded)
    trainer = Trainer(loaded, plan, teacher)
    rounds, parcels = trainer.rounds(0), []
    for _ in range(STAGES):
        next(rounds)
        parcels.append(trainer.inbox.parcels)
    engines = [new_engine(kind, loaded, parcels * (repeats + 1)) for kind in (WithoutBubbles, OneForwardOneBackward)]
    traces = [trace(engine, unit_seconds) for engine in engines]
    shares: list[list[float]] = [[], []]
    for step in range(repeats + 1):
        for own, engine, spans in zip(shares, engines, traces, strict=True):
            spans.clear()
            dist.barrier()
            engine.train_batch()
            # From when the first rank begins to compute to when the last one ends.
            ends = torch.tensor([-min(begin for begin, _ in spans), max(end for _, end in spans)], dtype=torch.float64)
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
            if step:  # the first one makes groups and buffers
                own.append(1 - sum(end - begin for begin, end in spans) / float(ends.sum()))
    launch.leave()
    return shares


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Compare the idle share of both schedules."""
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
