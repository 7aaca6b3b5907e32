"""Consolidation: time over a plain copy of the same bytes, memory over loading the model whole and saving it.

    python -m benchmarks.consolidate [--json FILE] [--quick]

A run with about 2 GB of random weights: a Qwen-Image teacher in bf16, and a checkpoint of float32 units that two ranks
have written, consolidated in shards of 200 MB. Laying out means building empty models to learn the shapes of the
variant: it grows with the number of blocks, not with their width. The other side of the time is `shutil.copyfile` and
`fsync` of the very files that ours wrote. Memory counts all resident pages, those of mapped files too, because a
machine must have room for them to be read.

DeepSpeed's `zero_to_fp32` is not compared with: it does not read checkpoints of pipeline engines.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import typer
from safetensors.torch import save_file

from benchmarks.load import MIB, Sampler, save_teacher
from benchmarks.ranks import run_ranks
from benchmarks.table import JsonFile, Quick, Row, row, row_of_pairs, show
from ppcl_ds.atomic import atomic_folder, fsync
from ppcl_ds.export.model_folder import write_model, write_sums
from ppcl_ds.teacher.anatomy import block_shapes
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.checkpoint import Checkpoint, Contents, Piece, SavedUnit, unit_sources
from ppcl_ds.units.plan import Plan, UnitPlan, load_plan
from ppcl_ds.units.variant import Layout, assembled, layout

SHARD = 200 * 10**6
"""Bytes of a weights file: a tenth of the model, as 5 GB are of a large one."""


def make_checkpoint(folder: Path, teacher: Path, blocks: int) -> None:
    """A plan of a unit for every other pair of blocks, and its checkpoint with random masters in two files."""
    opened = Teacher(teacher)
    shapes = block_shapes(opened.module(opened.blocks[0]))
    size = sum(shape.numel() for shape in shapes.values())
    units = tuple(UnitPlan(name=f"u{u}", span=(u, u + 1), streams=("image",)) for u in range(0, blocks - 2, 4))
    plan = Plan(teacher=opened.class_name, blocks=blocks, units=units, variants={"small": tuple(u.name for u in units)})
    plan.save(folder / "plan.yaml")
    cuts = [(0, size // 2), (size // 2, size)]
    pieces = [Piece(file=f"rank-{r:05d}.safetensors", start=a, stop=b) for r, (a, b) in enumerate(cuts)]
    for piece in pieces:
        save_file({f"{unit.name}/master": torch.randn(piece.stop - piece.start) for unit in units}, folder / piece.file)
    saved = SavedUnit(parameters={name: list(shape) for name, shape in shapes.items()}, pieces=pieces, skipped=0)
    contents = Contents(step=1, units={unit.name: saved for unit in units})
    (folder / "checkpoint.json").write_text(contents.model_dump_json())


class Run:
    """The synthetic run, opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher = Teacher(folder / "teacher")
        self.plan = load_plan(folder / "plan.yaml", self.teacher)
        self.checkpoint = Checkpoint(folder)

    def layout(self) -> Layout:
        """The variant, before a tensor is read."""
        units = partial(unit_sources, self.checkpoint, self.plan)
        return layout(self.teacher, self.plan, "small", units)

    def write(self, laid: Layout) -> Path:
        """Stream a variant's folder to the disk."""
        with atomic_folder(self.folder / "streamed") as out:
            write_model(laid, out / "transformer", SHARD)
        return self.folder / "streamed" / "transformer"

    def stream(self) -> Path:
        """All of `ppcl consolidate`: lay the variant out, write it, hash it."""
        written = self.write(self.layout())
        write_sums(self.folder / "streamed")
        return written

    def whole(self) -> None:
        """Load the variant whole, then save it."""
        checkpoint = self.checkpoint
        model = assembled(self.teacher, self.plan, "small", lambda unit: checkpoint.unit(unit.name))
        model.save_pretrained(self.folder / "whole", max_shard_size=SHARD)
        shutil.rmtree(self.folder / "whole")


def memory(folder: str, how: str) -> dict[str, int]:
    """Most bytes that consolidating added to this process, by kind of memory; `how` is a method of `Run`."""
    run = Run(Path(folder))
    run.layout()  # what is imported and allocated once, whatever the size, is not counted
    sampler = Sampler()
    getattr(run, how)()
    return sampler.growth()


def seconds_to_copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy of a folder's files, until they are on the disk."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    began = time.perf_counter()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        fsync(target / file.name)
    return time.perf_counter() - began


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Measure time and memory of consolidation."""
    blocks, repeats = (6, 2) if quick else (26, 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher", blocks, torch.bfloat16)
        make_checkpoint(folder, folder / "teacher", blocks)
        run = Run(folder)
        size = run.layout().bytes
        what = f"{size / MIB:.0f} MiB of weights, {len(run.plan.units)} units, shards of {SHARD / MIB:.0f} MiB"
        rows: list[Row] = []
        written = run.stream()  # also brings all files into memory, for both sides alike
        laid = run.layout()
        steps: dict[str, Callable[[], Path]] = {
            "time to write / copy": lambda: run.write(laid),
            "time to lay out, write and hash / copy": run.stream,
        }
        for title, step in steps.items():
            ours, other = [], []
            for _ in range(repeats):
                began = time.perf_counter()
                step()
                ours.append(time.perf_counter() - began)
                other.append(seconds_to_copy(written, folder / "copy"))
            rows.append(row_of_pairs(title, ours, other, "s", what))
        shutil.rmtree(folder / "copy")
        peaks = {
            how: run_ranks("benchmarks.consolidate:memory", 1, folder=str(folder), how=how)[0]
            for how in ("stream", "whole")
        }
        own = f"written by the process itself {peaks['stream']['RssAnon'] / MIB:.0f}"
        note = f"{what}; {own}, loaded whole {peaks['whole']['RssAnon'] / MIB:.0f}"
        streamed, loaded = (peaks[how]["VmRSS"] / MIB for how in ("stream", "whole"))
        rows.append(row("peak memory / load whole and save", streamed, loaded, "MiB", note))
        rows.append(row("peak memory / one shard", streamed, SHARD / MIB, "MiB", note))
    show("Consolidation", rows, json)


if __name__ == "__main__":
    typer.run(main)
