"""What fine-tuning over a pipeline costs: a step against a plain loop of the same work, and how long stages stand idle.

    python -m benchmarks.finetune [--json FILE] [--quick]

Everything runs on the CPU in float32, one thread a rank. The plain loop runs teacher and variant, both stock models, in
one process, without an optimizer. On two stages both sides run in the same two processes, the plain loop with half of
the micro-batches in each, so that both find the machine equally busy. For the idle share computing is waiting, as in
`benchmarks.schedule`: a forward sleeps, a backward sleeps twice as long, on four stages that do not fight for cores.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
import yaml

from benchmarks.ranks import THREADS, run_ranks
from benchmarks.schedule import trace
from benchmarks.step import time_in_turns
from benchmarks.table import JsonFile, Quick, Row, row, row_of_pairs, show
from benchmarks.testbeds import ppcl
from benchmarks.workload import Workload, prepare
from ppcl_ds.finetune.finetune import check
from ppcl_ds.finetune.trainer import FineTuner
from ppcl_ds.recipe import load_recipe

STAGES = 4
VARIANT = "half"


def ready(folder: Path, work: Workload) -> Path:
    """A run with a library, trained for one step; returns its recipe file."""
    gap = work.blocks // 4
    path = prepare(folder, work, {VARIANT: [(gap * i, gap * i + gap // 2) for i in range(4)]})
    recipe = yaml.safe_load(path.read_text())
    counts = {key: recipe["distill"][key] for key in ("steps", "micro_batch", "micro_batches_per_step")}
    path.write_text(yaml.safe_dump(recipe | {"finetune": counts}))
    ppcl("distill", path, "--until", "1")
    return path


def tuner(recipe: str) -> FineTuner:
    """The product's fine-tuning on this rank; all ranks together."""
    return FineTuner(check(load_recipe(Path(recipe)), VARIANT, None))


def against_a_plain_loop(recipe: str, work: dict[str, Any], repeats: int) -> list[list[float]]:
    """Seconds of a step and of the plain loop; a rank's task."""
    from ppcl_ds import launch
    from ppcl_ds.units.variant import assembled

    launch.join()
    load = Workload(**work)
    ours = tuner(recipe)
    batches = ours.batches(0)
    start = ours.start
    assert start.library is not None
    checkpoint = start.library.checkpoint
    student: Any = assembled(
        start.teacher, start.plan, VARIANT, lambda unit: checkpoint.unit(unit.name)
    ).requires_grad_(True)
    assert start.teacher.files.model_class is not None
    teacher = start.teacher.files.model_class.from_pretrained(start.teacher.files.folder).eval()
    _, batch = next(ours.data.take(dist.get_rank(), load.stages))

    def plain_loop() -> None:
        for _ in range(load.micro_batches // load.stages):
            with torch.no_grad():
                true = teacher(**batch.arguments | {"return_dict": False})[0]
            own = student(**batch.arguments | {"return_dict": False})[0]
            (own - true).square().mean().backward()
        for parameter in student.parameters():
            parameter.grad = None

    seconds = time_in_turns([partial(ours.step, batches), plain_loop], repeats)
    launch.leave()
    return seconds


def idle_shares(recipe: str, block_seconds: float, repeats: int) -> list[float]:
    """Idle share of this rank in each step; a rank's task."""
    from ppcl_ds import launch

    launch.join()
    ours = tuner(recipe)
    batches, own = ours.batches(0), []
    spans = trace(ours.engine, block_seconds)
    for step in range(repeats + 1):
        spans.clear()
        dist.barrier()
        ours.step(batches)
        ends = torch.tensor([-min(begin for begin, _ in spans), max(end for _, end in spans)], dtype=torch.float64)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        if step:  # the first one makes buffers
            own.append(1 - sum(end - begin for begin, end in spans) / float(ends.sum()))
    launch.leave()
    return own


def step_row(folder: Path, work: Workload, repeats: int) -> Row:
    """A step over the plain loop."""
    task, recipe = "benchmarks.finetune:against_a_plain_loop", ready(folder, work)
    ours, plain = run_ranks(task, work.stages, recipe=str(recipe), work=asdict(work), repeats=repeats)[0]
    count = work.micro_batches
    idle = (work.stages - 1) / (count + work.stages - 1)
    ranks = "one process" if work.stages == 1 else f"{work.stages} stages, a rank each, 1F1B idle in theory {idle:.2f}"
    note = f"{work}; {ranks}; {THREADS} thread a rank"
    return row_of_pairs(f"step / plain loop, {work.stages} stage{'s' * (work.stages > 1)}", ours, plain, "s", note)


def idle_row(folder: Path, micro_batches: int, block_seconds: float, repeats: int) -> Row:
    """Measured idle share over that of theory."""
    work = Workload(8, 64, micro_batch=1, micro_batches=micro_batches, stages=STAGES)
    arguments: dict[str, Any] = {"block_seconds": block_seconds, "repeats": repeats}
    ranks = run_ranks("benchmarks.finetune:idle_shares", STAGES, recipe=str(ready(folder, work)), **arguments)
    shares = [sum(each) / STAGES for each in zip(*ranks, strict=True)]
    theory = (STAGES - 1) / (micro_batches + STAGES - 1)
    note = (
        f"share of the time from the first forward's begin to the last backward's end that a stage spends in neither, "
        f"mean over stages and {repeats} steps; a forward takes {block_seconds:g} s; theory (P-1)/(M+P-1)"
    )
    name = f"idle, {STAGES} stages, {micro_batches} micro-batches: measured / theory"
    return row(name, sum(shares) / len(shares), theory, "share", note)


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Time a step against a plain loop, and measure idle shares."""
    repeats = 2 if quick else 5
    work = Workload(8, 256, micro_batch=2) if quick else Workload(8, 256, micro_batch=4, micro_batches=8)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for stages in (1, 2):
            rows.append(step_row(Path(folder) / f"step-{stages}", replace(work, stages=stages), repeats))
        for micro_batches in (STAGES,) if quick else (STAGES, 2 * STAGES):
            path = Path(folder) / f"idle-{micro_batches}"
            rows.append(idle_row(path, micro_batches, 0.1 if quick else 0.2, repeats))
    show("Fine-tuning", rows, json)


if __name__ == "__main__":
    typer.run(main)
