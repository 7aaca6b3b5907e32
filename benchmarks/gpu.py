"""The engine at the block size of Qwen-Image on one GPU: what a step costs, how well it uses the card, what it holds.

    python -m benchmarks.gpu [--json FILE] [--quick]

The teacher is random, a few blocks as wide as Qwen-Image's, and reads about 6,900 image tokens a sample, in bfloat16.
Both sides of a row run in the same process, one after the other in turns, but for memory: there each side has a process
of its own, as only what it alone holds counts. With `--quick` everything is small, and runs without a GPU, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.ranks import THREADS, device_here, run_ranks
from benchmarks.step import WARM_UP, EngineStep, seconds_of
from benchmarks.table import JsonFile, Quick, Row, row, row_of_pairs, show
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


def alone(recipe: str, repeats: int) -> dict[str, Any]:
    """A run with the device to itself; a rank's task.

    Returns:
        `peak`: most bytes of tensors in a step. `step` and `product`: FLOP/s of a step and of one large matrix product,
        `repeats` of each in turns. `device`: what it ran on, in words.
    """
    from ppcl_ds import launch

    device = launch.join()
    from ppcl_ds.watch.timer import matrix_rate

    engine, peak = peak_of_steps(Path(recipe))
    dtype = DTYPES[load_recipe(Path(recipe)).teacher.precision]
    pairs = [(engine.flops / seconds_of(engine), matrix_rate(device, dtype)) for _ in range(repeats)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"the CPU, {THREADS} thread"
    launch.leave()
    step, product = ([pair[side] for pair in pairs] for side in (0, 1))
    return {"peak": peak, "step": step, "product": product, "device": f"{name}, torch {torch.__version__}"}


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
    """

    def __init__(self, folder: Path, work: Workload) -> None:
        teacher = folder / "teacher"
        save_teacher(teacher, work)
        self.work, self.device = work, device_here()
        self.one = prepare(folder / "one", work, ONE, teacher=teacher)
        self.four = prepare(folder / "four", work, LIBRARY, teacher=teacher)
        self.saving = prepare(folder / "saving", work, ONE, teacher=teacher, checkpointing=True)

    def rows(self, repeats: int) -> Iterator[Row]:
        """Every row as soon as it is there; one rank after the other has the device."""
        plain, saving = self._alone(self.one, repeats), self._alone(self.saving, 0)
        where = plain["device"]
        yield self.overhead(where, repeats)
        yield self.variants(where, repeats)
        yield self.achieved(plain)
        yield self.against_estimate(plain)
        yield self.seconds_of_saving(where, repeats)
        yield self.memory_of_saving(plain, saving)

    def overhead(self, where: str, repeats: int) -> Row:
        """A step over its bare parts."""
        task, work = "benchmarks.step:against_bare_parts", asdict(self.work)
        [(engine, bare)] = run_ranks(task, 1, self.device, recipe=str(self.one), work=work, repeats=repeats)
        return row_of_pairs("step / bare parts", engine, bare, "s", f"{self.work}; {_units(ONE)} units; {where}")

    def variants(self, where: str, repeats: int) -> Row:
        """A step for four variants over a step for one of them."""
        many, single = self._side_by_side(self.four, self.one, repeats)
        note = f"{_units(LIBRARY)} units against {_units(ONE)}; four runs would be 4; {where}"
        return row_of_pairs("four variants / one variant", many, single, "s", note)

    def achieved(self, plain: dict[str, Any]) -> Row:
        """FLOP/s of a step over those of a large matrix product."""
        step, product = ([rate / 1e12 for rate in plain[side]] for side in ("step", "product"))
        note = f"matrix products and attention of teacher and units, as counted for the estimate; {plain['device']}"
        return row_of_pairs("FLOP/s, step / matrix product", step, product, "TFLOP/s", note)

    def against_estimate(self, plain: dict[str, Any]) -> Row:
        """Peak memory of a step over what `ppcl estimate` says of the run."""
        # The accelerator decides whether it fits, not how much it is.
        inputs = read_inputs(load_recipe(self.one), 1, 1)
        estimate = size(inputs, accelerator_called("h100"))
        memory = estimate.memory
        note = f"worst phase of the estimate: {memory.worst}; {plain['device']}"
        return row("peak memory, step / estimate", plain["peak"] / GIB, memory.peak / GIB, "GiB", note)

    def seconds_of_saving(self, where: str, repeats: int) -> Row:
        """A step that computes its activations again over one that keeps them."""
        again, kept = self._side_by_side(self.saving, self.one, repeats)
        return row_of_pairs("step, checkpointing / without", again, kept, "s", f"activation checkpointing; {where}")

    def memory_of_saving(self, plain: dict[str, Any], saving: dict[str, Any]) -> Row:
        """Peak memory of a step that computes its activations again over that of one that keeps them."""
        note = f"everything that is held, activations and the rest; {plain['device']}"
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


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Measure steps at the block size of Qwen-Image on one GPU."""
    if device_here() == "cpu":
        if not quick:
            print("no CUDA GPU to be used here, and the full table needs one; --quick has a small one for the CPU")
            raise typer.Exit(1)
        print("no CUDA GPU to be used here: the CPU's numbers; memory is that of tensors, counted as they are made")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), SMALL if quick else QWEN_IMAGE)
        for each in runs.rows(repeats=2 if quick else 10):
            print(f"{each.name}: {each.ratio:.3f}", flush=True)  # not lost if a later one fails
            rows.append(each)
    show("A training step on one device", rows, json)


if __name__ == "__main__":
    typer.run(main)
