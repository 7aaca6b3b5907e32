"""The engine at the block size of Qwen-Image on GPUs: what a step costs, how well it uses a card, what it holds.

    python -m benchmarks.gpu [--json FILE] [--markdown FILE] [--minutes 10] [--quick]

The teacher is random, a few blocks as wide as Qwen-Image's, and reads about 6,900 image tokens a sample, in bfloat16.
Where there are several GPUs, some rows take up to five of them: the teacher gathered from all, the exchange. What has
not begun when the minutes are over is left out, and named.
Both sides of a row run in the same process, one after the other in turns, but for memory: there each side has a process
of its own, as only what it alone holds counts. With `--quick` everything is small, and runs without a GPU, too.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from benchmarks.ranks import device_here, run_ranks
from benchmarks.step import WARM_UP, EngineStep, seconds_of
from benchmarks.table import JsonFile, Quick, Row, markdown, row, row_of_pairs, show
from benchmarks.workload import Span, Workload, prepare, save_teacher
from ppcl_ds.estimate.accelerators import accelerator_called
from ppcl_ds.estimate.activations import LiveBytes
from ppcl_ds.estimate.estimate import size
from ppcl_ds.estimate.inputs import read_inputs
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.noising import DTYPES

GIB = 2**30
QWEN_IMAGE = Workload(
    blocks=6, width=3072, side=166, words=64, micro_batch=1, micro_batches=4, head=128, precision="bf16"
)
"""Its 24 heads of 128 and its 83 x 83 tokens; 6 blocks of its 60, and latents of 3 channels for its 16."""
SMALL = Workload(blocks=6, width=256, side=64, micro_batch=1, micro_batches=2, head=128, precision="bf16")

LIBRARY: dict[str, list[Span]] = {
    "minus17": [(0, 1)],
    "minus33": [(0, 1), (4, 5)],
    "minus50": [(0, 1), (3, 5)],
    "minus67": [(0, 2), (3, 5)],
}
"""Four variants of a 6-block teacher that share units about as the 12-block ones of `step` do: 4 units, 7 uses."""
ONE = {"minus50": LIBRARY["minus50"]}
BUCKETS = (50_000_000, 1_000_000_000)
"""Elements that are gathered ahead, beside what the product chooses: DeepSpeed's default, and several blocks."""


def alone(recipe: str, repeats: int) -> dict[str, Any]:
    """A run with the device to itself; a rank's task.

    Returns:
        `peak`: most bytes of tensors in a step. `step` and `product`: FLOP/s of a step and of one large matrix product,
        `repeats` of each in turns.
    """
    from ppcl_ds import launch

    device = launch.join()
    from ppcl_ds.watch.timer import matrix_rate

    engine, peak = peak_of_steps(Path(recipe))
    dtype = DTYPES[load_recipe(Path(recipe)).teacher.precision]
    pairs = [(engine.flops / seconds_of(engine), matrix_rate(device, dtype)) for _ in range(repeats)]
    launch.leave()
    step, product = ([pair[side] for pair in pairs] for side in (0, 1))
    return {"peak": peak, "step": step, "product": product}


def _ranks(world: int) -> str:
    return f"{world} rank{'s' if world > 1 else ''}"


def _bucket(elements: int | None) -> str:
    return "bucket as chosen" if elements is None else f"bucket of {elements / 1e6:g} M"


def peak_of_steps(recipe: Path) -> tuple[EngineStep, int]:
    """An engine that has taken its first steps, and the most bytes that tensors took at once in them.

    A GPU's allocator knows. On the CPU each tensor is counted as it is made, from before there is an engine; what the
    allocator and the libraries take besides is as large there as the whole of a small run.
    """
    if torch.cuda.is_available():
        engine = EngineStep(recipe)
        torch.cuda.reset_peak_memory_stats()
        _steps(engine)
        return engine, torch.cuda.max_memory_allocated()
    with LiveBytes("cpu") as live:
        engine = EngineStep(recipe)
        live.peak = live.now
        _steps(engine)
    return engine, live.peak


def _steps(engine: EngineStep) -> None:
    for _ in range(WARM_UP):
        engine()


class Runs:
    """The runs that are measured, all on one teacher.

    Attributes:
        one: recipe of a library with the units of one variant.
        four: with those of four.
        saving: `one` with activation checkpointing.
        compiling: `one` with compiled units.
        staged: a unit on each of several stages, where there are several ranks.
    """

    def __init__(self, folder: Path, work: Workload) -> None:
        teacher = folder / "teacher"
        save_teacher(teacher, work)
        self.work, self.device = work, device_here()
        gpus = torch.cuda.device_count()
        self.world = min(gpus, work.blocks - 1) if self.device == "cuda" else 2
        [self.where] = run_ranks("benchmarks.gpu_parts:where", 1, self.device)
        self.one = prepare(folder / "one", work, ONE, teacher=teacher)
        self.four = prepare(folder / "four", work, LIBRARY, teacher=teacher)
        self.saving = prepare(folder / "saving", work, ONE, teacher=teacher, checkpointing=True)
        self.compiling = prepare(folder / "compiling", work, ONE, teacher=teacher)
        raw = yaml.safe_load(self.compiling.read_text())
        raw["distill"]["compile"] = True
        self.compiling.write_text(yaml.safe_dump(raw))
        if self.world > 1:
            spread = {f"from {first}": [(first, first + 1)] for first in range(self.world)}
            staged = replace(work, stages=self.world, micro_batches=2 * self.world)
            self.staged = prepare(folder / "staged", staged, spread, teacher=teacher)

    def measurements(self, repeats: int) -> dict[str, Callable[[], list[Row]]]:
        """Every measurement by its name, what matters most first; one rank, or all of them, have the device."""
        several = {"exchange": self.exchange} if self.world > 1 else {}
        compiled = {} if self.device == "cpu" else {"compile": lambda: [self.compiled(repeats)]}
        return {
            "step": lambda: [self.overhead(repeats), self.variants(repeats)],
            "use of the card": lambda: self.alone(repeats),
            "teacher": lambda: self.teacher(repeats),
            "mask": lambda: [self.mask(repeats)],
            **several,
            **compiled,
            "checkpointing": lambda: [self.seconds_of_saving(repeats)],
        }

    def teacher(self, repeats: int) -> list[Row]:
        """The sharded teacher over the stock one, by bucket size; and the host's part of it, block by block."""
        buckets = [None, *BUCKETS]
        options = {"recipe": str(self.one), "work": asdict(self.work), "buckets": buckets, "repeats": repeats}
        found = run_ranks("benchmarks.gpu_parts:teacher_forwards", self.world, self.device, **options)[0]
        plain, *sharded = found["seconds"]
        where = f"{_ranks(self.world)}; {self.where}"
        rows = [
            row_of_pairs(f"teacher forward, ZeRO-3 ({_bucket(bucket)}) / stock", own, plain, "s", where)
            for bucket, own in zip(buckets, sharded, strict=True)
        ]
        stock, ours, *_ = [[1000 * each / self.work.blocks for each in side] for side in found["host"]]
        return [*rows, row_of_pairs("host time a block, ZeRO-3 / stock", ours, stock, "ms", where)]

    def mask(self, repeats: int) -> Row:
        """A stock forward whose captions are padded over one that needs no mask."""
        work = replace(self.work, micro_batch=2)
        options = {"recipe": str(self.one), "work": asdict(work), "repeats": repeats}
        [[masked, bare]] = run_ranks("benchmarks.gpu_parts:masks", 1, self.device, **options)
        return row_of_pairs("teacher forward, with a mask / without", masked, bare, "s", f"2 samples; {self.where}")

    def exchange(self) -> list[Row]:
        """What a step spends in the exchange, on as many stages as there are ranks."""
        steps = 5
        found = run_ranks("benchmarks.gpu_parts:phases", self.world, self.device, recipe=str(self.staged), steps=steps)
        worst = max(found, key=lambda rank: rank["exchange"])
        note = f"{_ranks(self.world)}, a stage each; the slowest rank, mean of {steps} steps; {self.where}"
        return [row("exchange / step", worst["exchange"], worst["step"], "s", note)]

    def compiled(self, repeats: int) -> Row:
        """A step whose units are compiled over one whose units are not."""
        fused, plain = self._side_by_side(self.compiling, self.one, repeats)
        return row_of_pairs("step, compiled units / as they are", fused, plain, "s", f"distill.compile; {self.where}")

    def alone(self, repeats: int) -> list[Row]:
        """Runs that have the device to themselves."""
        plain, saving = self._alone(self.one, repeats), self._alone(self.saving, 0)
        rows = [self.achieved(plain), self.against_estimate(plain), self.memory_of_saving(plain, saving)]
        if self.device == "cuda":
            rows.append(self.reserved())
        return rows

    def reserved(self) -> Row:
        """What torch's allocator holds over what tensors take, and how often it was short."""
        [found] = run_ranks("benchmarks.gpu_parts:phases", 1, self.device, recipe=str(self.one), steps=20)
        note = f"in 20 steps; allocator retries: {found['retries']:.0f}; {self.where}"
        return row("memory, reserved / allocated", found["reserved"] / GIB, found["allocated"] / GIB, "GiB", note)

    def overhead(self, repeats: int) -> Row:
        """A step over its bare parts."""
        task, work = "benchmarks.step:against_bare_parts", asdict(self.work)
        [(engine, bare)] = run_ranks(task, 1, self.device, recipe=str(self.one), work=work, repeats=repeats)
        return row_of_pairs("step / bare parts", engine, bare, "s", f"{self.work}; {_units(ONE)} units; {self.where}")

    def variants(self, repeats: int) -> Row:
        """A step for four variants over a step for one of them."""
        many, single = self._side_by_side(self.four, self.one, repeats)
        note = f"{_units(LIBRARY)} units against {_units(ONE)}; four runs would be 4; {self.where}"
        return row_of_pairs("four variants / one variant", many, single, "s", note)

    def achieved(self, plain: dict[str, Any]) -> Row:
        """FLOP/s of a step over those of a large matrix product."""
        step, product = ([rate / 1e12 for rate in plain[side]] for side in ("step", "product"))
        note = f"matrix products and attention of teacher and units, as counted for the estimate; {self.where}"
        return row_of_pairs("FLOP/s, step / matrix product", step, product, "TFLOP/s", note)

    def against_estimate(self, plain: dict[str, Any]) -> Row:
        """Peak memory of a step over what `ppcl estimate` says of the run."""
        # The accelerator decides whether it fits, not how much it is.
        inputs = read_inputs(load_recipe(self.one), 1, 1)
        estimate = size(inputs, accelerator_called("h100"))
        memory = estimate.memory
        note = f"worst phase of the estimate: {memory.worst}; {self.where}"
        return row("peak memory, step / estimate", plain["peak"] / GIB, memory.peak / GIB, "GiB", note)

    def seconds_of_saving(self, repeats: int) -> Row:
        """A step that computes its activations again over one that keeps them."""
        again, kept = self._side_by_side(self.saving, self.one, repeats)
        return row_of_pairs(
            "step, checkpointing / without", again, kept, "s", f"activation checkpointing; {self.where}"
        )

    def memory_of_saving(self, plain: dict[str, Any], saving: dict[str, Any]) -> Row:
        """Peak memory of a step that computes its activations again over that of one that keeps them."""
        note = f"everything that is held, activations and the rest; {self.where}"
        return row("peak memory, checkpointing / without", saving["peak"] / GIB, plain["peak"] / GIB, "GiB", note)

    def _alone(self, recipe: Path, repeats: int) -> dict[str, Any]:
        [found] = run_ranks("benchmarks.gpu:alone", 1, self.device, recipe=str(recipe), repeats=repeats)
        return found

    def _side_by_side(self, ours: Path, other: Path, repeats: int) -> list[list[float]]:
        recipes = [str(ours), str(other)]
        [seconds] = run_ranks("benchmarks.step:side_by_side", 1, self.device, recipes=recipes, repeats=repeats)
        return seconds


def _units(variants: dict[str, list[Span]]) -> int:
    return len({span for spans in variants.values() for span in spans})


def main(
    json: JsonFile = None,
    quick: Quick = False,
    page: Annotated[Path | None, typer.Option("--markdown", help="Also write a page of Markdown.")] = None,
    minutes: Annotated[float, typer.Option(help="What has not begun by then is left out.")] = 10.0,
) -> None:
    """Measure steps at the block size of Qwen-Image on GPUs."""
    if device_here() == "cpu":
        if not quick:
            print("no CUDA GPU to be used here, and the full table needs one; --quick has a small one for the CPU")
            raise typer.Exit(1)
        print("no CUDA GPU to be used here: the CPU's numbers; memory is that of tensors, counted as they are made")
    end = time.monotonic() + 60 * minutes
    rows: list[Row] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), SMALL if quick else QWEN_IMAGE)
        for name, measure in runs.measurements(repeats=2 if quick else 6).items():
            if time.monotonic() > end:
                left_out.append(name)
                continue
            for each in measure():
                print(f"{each.name}: {each.ratio:.3f}", flush=True)  # not lost if a later one fails
                rows.append(each)
    if left_out:
        print(f"left out, as {minutes:g} minutes were over: {', '.join(left_out)}")
    show("A training step on GPUs", rows, json)
    if page is not None:
        facts = [
            f"{runs.work}",
            f"{_ranks(runs.world)} where a row says so; {runs.where}, DeepSpeed {version('deepspeed')}",
        ]
        facts += [f"left out for lack of time: {', '.join(left_out)}"] if left_out else []
        page.write_text(markdown("A training step on GPUs", rows, facts))


if __name__ == "__main__":
    typer.run(main)
