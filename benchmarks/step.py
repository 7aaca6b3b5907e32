"""What the engine costs: a training step against the bare work in it, and four variants against one.

    python -m benchmarks.step [--json FILE] [--quick]

Everything runs on the CPU in float32, one thread a rank. The bare parts of a step are as many teacher forwards and as
many forwards and backwards of every unit, in a plain loop over stock modules without an optimizer. On two ranks they
run in the same two processes at once, each with its share, so that both sides find the machine equally busy.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
import yaml

from benchmarks.plain import Latents, PlainStudents
from benchmarks.ranks import THREADS, run_ranks
from benchmarks.table import JsonFile, Quick, Row, row_of_pairs, show
from benchmarks.workload import Span, Workload, prepare

WARM_UP = 2
"""Steps of each side before the clock starts: the sharded teacher records its order of gathers in the first ones."""

USES = 4
"""Steps for each teacher forward where it is used again."""

TEACHER, UNITS = 99.0, 86.0
"""TFLOP a sample of Qwen-Image at 1024 pixels: the teacher's forward, and 13 depth units trained with recomputation."""

LIBRARY: dict[str, list[Span]] = {
    "minus25": [(1, 2), (8, 9), (10, 11)],
    "minus40": [(1, 2), (4, 5), (8, 11)],
    "minus50": [(1, 2), (4, 6), (8, 11)],
    "minus60": [(1, 2), (4, 7), (8, 11)],
}
"""What `ppcl plan` chose for the demo's trained 12-block teacher at 25, 40, 50 and 60 percent: 7 units, 12 uses."""


class EngineStep:
    """The product's own training step; every rank must construct one and call it.

    Attributes:
        spans: the spans whose units this rank trains.
        flops: of a step, over all ranks.
    """

    def __init__(self, recipe: Path) -> None:
        from ppcl_ds.distill.distill import check
        from ppcl_ds.distill.trainer import Trainer
        from ppcl_ds.recipe import load_recipe

        loaded = load_recipe(recipe)
        teacher, plan = check(loaded)
        self.trainer = Trainer(loaded, plan, teacher)
        self.batches = self.trainer.batches(0)
        settings = loaded.distill
        samples = settings.micro_batch * settings.micro_batches_per_step
        self.flops = self.trainer.work.per_step(samples, settings.activation_checkpointing)
        names = self.trainer.library.stage_units[self.trainer.engine.stage_id]
        self.spans = [plan.unit(name).span for name in names]

    def __call__(self) -> None:
        """One optimizer step, as the training loop takes it."""
        self.trainer.step(self.batches)


def time_in_turns(sides: Sequence[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Seconds of every side, `repeats` of them, warm-up excluded; every rank must call this.

    The sides take turns, so that a machine that is slower for a while is slower for all of them. A side's time ends
    when the last rank has finished it.
    """
    for _ in range(WARM_UP):
        for side in sides:
            side()
    turns = [[seconds_of(side) for side in sides] for _ in range(repeats)]
    return [list(column) for column in zip(*turns, strict=True)]


def seconds_of(action: Callable[[], None]) -> float:
    """From when every rank is ready to when the last one has done it; every rank must call this."""
    _wait_for_all()
    began = time.perf_counter()
    action()
    _wait_for_all()
    return time.perf_counter() - began


def _wait_for_all() -> None:
    """Until every rank is here, and its GPU, if it computes on one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def against_bare_parts(recipe: str, work: dict[str, Any], repeats: int) -> list[list[float]]:
    """Seconds of an engine step and of its bare parts; a rank's task."""
    from ppcl_ds import launch

    device = launch.join()
    load = Workload(**work)
    engine = EngineStep(Path(recipe))
    plain = PlainStudents(engine.trainer.teacher.files.folder, engine.spans, load.dtype, device)
    batch = Latents.random(load, torch.Generator().manual_seed(dist.get_rank()), device)
    reading = plain.read(batch)

    def bare_parts() -> None:
        for _ in range(load.micro_batches // load.stages):
            plain.forward(batch)
        for _ in range(load.micro_batches):
            for place in range(len(plain.units)):
                plain.loss(reading, place).backward()
        for parameter in plain.parameters():
            parameter.grad = None

    seconds = time_in_turns([engine, bare_parts], repeats)
    launch.leave()
    return seconds


def side_by_side(recipes: list[str], repeats: int, steps: int = 1) -> list[list[float]]:
    """Seconds of so many steps of several runs, side by side in one process; a rank's task."""
    from ppcl_ds import launch

    launch.join()
    engines = [EngineStep(Path(recipe)) for recipe in recipes]

    def taking(engine: EngineStep) -> None:
        for _ in range(steps):
            engine()

    seconds = time_in_turns([partial(taking, engine) for engine in engines], repeats)
    launch.leave()
    return seconds


def overhead_row(folder: Path, work: Workload, repeats: int) -> Row:
    """An engine step over its bare parts; four units, spread over the teacher, the last at its end."""
    gap = work.blocks // 4
    spans = [(gap * (i + 1) - 2, gap * (i + 1) - 1) for i in range(4)]
    recipe = prepare(folder, work, {"half": spans})
    task = "benchmarks.step:against_bare_parts"
    engine, bare = run_ranks(task, work.stages, recipe=str(recipe), work=asdict(work), repeats=repeats)[0]
    ranks = "one process" if work.stages == 1 else f"{work.stages} stages, a rank each"
    name = f"step / bare parts, {ranks}"
    return row_of_pairs(name, engine, bare, "s", f"{work}; 4 units; {THREADS} thread a rank")


def variants_row(folder: Path, work: Workload, repeats: int) -> Row:
    """A step for the library of four variants over a step for one of them."""
    one = {"minus50": LIBRARY["minus50"]}
    recipes = [str(prepare(folder / str(len(each)), work, each)) for each in (LIBRARY, one)]
    [(many, single)] = run_ranks("benchmarks.step:side_by_side", 1, recipes=recipes, repeats=repeats)
    units = len({span for spans in LIBRARY.values() for span in spans})
    note = f"{work}; {units} units against {len(one['minus50'])}; four runs would be 4"
    return row_of_pairs("four variants / one variant", many, single, "s", note)


def replay_row(folder: Path, work: Workload, repeats: int) -> Row:
    """Samples a second that a unit sees with each teacher forward used four times, over none used again."""
    recipes = [prepare(folder / name, work, {"minus50": LIBRARY["minus50"]}) for name in ("replay", "fresh")]
    raw = yaml.safe_load(recipes[0].read_text())
    raw["distill"]["replay"] = {"uses": USES, "ring": 2 * USES}
    recipes[0].write_text(yaml.safe_dump(raw))
    paths = [str(path) for path in recipes]
    [seconds] = run_ranks("benchmarks.step:side_by_side", 1, recipes=paths, repeats=repeats, steps=USES)
    samples = USES * work.micro_batches * work.micro_batch
    rates = [[samples / each for each in side] for side in seconds]
    published = (TEACHER + UNITS) / (TEACHER / USES + UNITS)
    note = f"{work}; {len(LIBRARY['minus50'])} units; by FLOPs, the published plan of Qwen-Image gains {published:.2f}"
    return row_of_pairs(f"each forward used {USES} times / once", rates[0], rates[1], "samples/s", note)


def main(
    json: JsonFile = None,
    quick: Quick = False,
    only: Annotated[
        str, typer.Option(help="Just this measurement: one, two (stages), many (variants) or replay.")
    ] = "",
) -> None:
    """Time the engine's step against its bare parts, and four variants against one."""
    repeats = 2 if quick else 5
    work, many = Workload(8, 512, micro_batch=8, micro_batches=4), Workload(12, 512, micro_batch=8, micro_batches=4)
    if quick:
        work, many = Workload(8, 256), Workload(12, 256, micro_batch=2)
    # What a rank owes is merged into one teacher forward: its parameters are gathered once a step.
    merged = replace(work, stages=2, micro_batch=work.micro_batch * work.micro_batches // 2, micro_batches=2)
    measurements = {
        "one": partial(overhead_row, work=work),
        "two": partial(overhead_row, work=merged),
        "many": partial(variants_row, work=many),
        "replay": partial(replay_row, work=many),
    }
    with tempfile.TemporaryDirectory() as folder:
        names = [name for name in measurements if only in ("", name)]
        rows = [measurements[name](Path(folder) / name, repeats=repeats) for name in names]
    show("A training step", rows, json)


if __name__ == "__main__":
    typer.run(main)
