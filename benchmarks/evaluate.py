"""Drawing prompt sets: images a second on two ranks over one, and what evaluation adds to bare pipeline calls.

    python -m benchmarks.evaluate [--json FILE] [--quick]

A random Qwen-Image transformer draws a set of prompts as `ppcl evaluate` does. Images a second are read off the times
at which their files appear, so loading does not count. The other side of the overhead is the stock pipeline's own call
with the same arguments in the same process, one call of each after the other.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import typer
import yaml

from benchmarks.ranks import device_here, run_ranks
from benchmarks.table import JsonFile, Quick, Row, row, row_of_pairs, show
from benchmarks.workload import Workload, prepare
from ppcl_ds import launch
from ppcl_ds.atomic import atomic_write
from ppcl_ds.evaluate.drawing import Images, draw_sets
from ppcl_ds.evaluate.layouts import read_set
from ppcl_ds.evaluate.painter import Painter
from ppcl_ds.export.load import load_pipeline
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.teacher.teacher import open_teacher

STEPS = 4


def images_a_second(recipe: str) -> float:
    """Draw the set on all ranks; every rank must call this. Images between the first and the last, a second."""
    loaded = load_recipe(Path(recipe))
    sets = [read_set(each, loaded.run) for each in loaded.evaluate.sets]
    draw_sets(Images(loaded, open_teacher(loaded), ["teacher"], sets))
    if not launch.is_first_rank():
        return 0.0
    times = sorted(path.stat().st_mtime for path in (loaded.run / "evaluate").glob("*/drawn/teacher/*.png"))
    for path in (loaded.run / "evaluate").glob("*/drawn/teacher/*.png"):
        path.unlink()
    return (len(times) - 1) / (times[-1] - times[0])


def overhead(recipe: Path, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of an image as evaluation draws it and keeps it, and of bare calls of the stock pipeline."""
    loaded = load_recipe(recipe)
    teacher = open_teacher(loaded)
    device = torch.device(device_here())
    painter = Painter(loaded, teacher, device, sharded=False)
    painter.load("teacher")
    stock: Any = load_pipeline(loaded.teacher.path, DTYPES[loaded.teacher.precision]).to(device)
    stock.set_progress_bar_config(disable=True)
    size = loaded.data.images.size
    ours, other = [], []
    for number in range(pairs + 1):
        begin = time.perf_counter()
        buffer = io.BytesIO()
        painter.draw(f"word{number}", number, size).save(buffer, "PNG")
        atomic_write(loaded.run / "drawn.png", buffer.getvalue())
        middle = time.perf_counter()
        generator = torch.Generator().manual_seed(number)
        stock(f"word{number}", height=size, width=size, generator=generator, **painter.options)
        ours.append(middle - begin)
        other.append(time.perf_counter() - middle)
    return ours[1:], other[1:]  # the first ones also warm up


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Measure drawing."""
    work = Workload(blocks=4, width=256, side=64) if quick else Workload(blocks=8, width=512, side=64)
    count = 16 if quick else 48
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path = prepare(Path(folder) / "run", work, {"small": [(0, 1)]})
        (Path(folder) / "prompts.txt").write_text("".join(f"word{number}\n" for number in range(count)))
        recipe = yaml.safe_load(path.read_text())
        one = {"name": "words", "prompts": str(Path(folder) / "prompts.txt")}
        recipe["evaluate"] = {**recipe.get("evaluate", {}), "steps": STEPS, "guidance": 2.0, "sets": [one]}
        path.write_text(yaml.safe_dump(recipe))
        device = device_here()
        found = {}
        for world in (1, 2):
            found[world], *_ = run_ranks("benchmarks.evaluate:images_a_second", world, device, recipe=str(path))
        rows.append(row("images a second, 2 ranks / 1", found[2], found[1], "images/s", f"{count} images; {work}"))
        ours, other = overhead(path, 8 if quick else 24)
        note = f"{STEPS} steps with guidance, written as PNG; {work}"
        rows.append(row_of_pairs("evaluation / bare pipeline calls", ours, other, "s an image", note))
    show("Drawing prompt sets", rows, json)


if __name__ == "__main__":
    typer.run(main)
