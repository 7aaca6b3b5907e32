"""`ppcl evaluate --speed`: seconds an image and memory as users meet them, by the stock pipeline's own call."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ppcl_ds import launch
from ppcl_ds.atomic import atomic_write
from ppcl_ds.console import progress
from ppcl_ds.errors import UserError, brief
from ppcl_ds.evaluate.painter import Painter
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.teacher import Teacher

BATCHES = (1, 2, 4)
_REPEATS = 3
"""Calls that are timed, after one that is not."""
_PROMPT = "a photograph of a red house by a lake in the mountains, with snow on its roof"


class Speed(BaseModel):
    """One row of `speed.json`.

    Attributes:
        way: `plain`, `compiled` (torch.compile), `cached` (cache-dit) or both.
        size: pixels of a side.
        seconds: of an image, end to end, prompt to pixels: the median of a few calls over the batch; None: see `fault`.
        peak_gib: the most memory that torch had allocated on the GPU meanwhile; None without one.
        fault: why it could not be measured.
    """

    model: str
    way: str
    size: int
    batch: int
    seconds: float | None = None
    peak_gib: float | None = None
    fault: str = ""


Step = Callable[[Painter], Callable[[], object] | None]
"""What prepares a pipeline; it returns what takes back whatever would outlive the pipeline."""


def _plain(painter: Painter) -> None:
    """As it is."""


def _compiled(painter: Painter) -> None:
    """Block by block where the class can: minutes less than the whole, and nearly as fast."""
    transformer = getattr(painter.pipeline, painter.teacher.component)
    with suppress(AttributeError, ValueError):  # an older release, or a class that names no repeated blocks
        transformer.compile_repeated_blocks()
        return
    transformer.compile()


def _cached(painter: Painter) -> Callable[[], object]:
    """cache-dit's own defaults. It changes the class, and so the next pipeline, and keeps this one's model."""
    package = import_module("cache_dit")
    package.enable_cache(painter.pipeline)
    return partial(package.disable_cache, painter.pipeline)


def ways() -> dict[str, Sequence[Step]]:
    """What can be measured here."""
    found: dict[str, Sequence[Step]] = {"plain": (_plain,), "compiled": (_compiled,)}
    if find_spec("cache_dit"):
        found |= {"cached": (_cached,), "cached and compiled": (_cached, _compiled)}
    return found


def measure_speed(recipe: Recipe, teacher: Teacher, models: Sequence[str], names: Sequence[str] = ()) -> list[Speed]:
    """Time every model at every size of the recipe, in every way and batch; write and print the table.

    Args:
        names: of the ways; empty: all of them.

    Raises:
        UserError: the teacher cannot draw at all.
    """
    sizes = sorted({recipe.data.images.size, *(each.size for each in recipe.evaluate.sets if each.size)})
    chosen = {name: each for name, each in ways().items() if not names or name in names}
    device, rows = launch.device(), []
    with progress("speed", len(models) * len(chosen)) as advance:
        for model in models:
            for way, steps in chosen.items():
                # A pipeline of its own each time: what caches and compilers have changed is not undone.
                painter = Painter(recipe, teacher, device, sharded=False)
                painter.load(model)
                with ExitStack() as undone:
                    fault = _prepared(painter, steps, undone)
                    for size in sizes:
                        for batch in BATCHES:
                            row = Speed(model=model, way=way, size=size, batch=batch, fault=fault)
                            rows.append(row if fault else _timed(painter, row))
                advance(1, note=model)
                del painter
    atomic_write(recipe.run / "speed.json", TypeAdapter(list[Speed]).dump_json(rows, indent=1) + b"\n")
    _show(rows)
    print(f"wrote {recipe.run}/speed.json")
    return rows


def read_speed(run: Path) -> list[Speed]:
    """What was measured; nothing where there is no readable file."""
    try:
        return TypeAdapter(list[Speed]).validate_json((run / "speed.json").read_bytes())
    except (OSError, ValueError):
        return []


def _prepared(painter: Painter, steps: Sequence[Step], undone: ExitStack) -> str:
    """Prepare a pipeline until `undone` closes; why it cannot be, or nothing."""
    try:
        for step in steps:
            if undo := step(painter):
                undone.callback(undo)
    except Exception as fault:  # whatever another package says to a pipeline that it does not know
        return brief(fault)
    return ""


@torch.no_grad()
def _timed(painter: Painter, row: Speed) -> Speed:
    pipeline, options = painter.pipeline, dict(painter.options)
    if row.batch > 1 and "num_images_per_prompt" not in inspect.signature(pipeline.__call__).parameters:
        return row.model_copy(update={"fault": "draws one image of a prompt"})
    if row.batch > 1:
        options["num_images_per_prompt"] = row.batch
    on_gpu = painter.device.type == "cuda"
    seconds = []
    try:
        for repeat in range(_REPEATS + 1):
            if on_gpu and repeat == 1:
                torch.cuda.reset_peak_memory_stats(painter.device)
            begin = time.perf_counter()
            pipeline(_PROMPT, height=row.size, width=row.size, generator=torch.Generator().manual_seed(0), **options)
            if on_gpu:
                torch.cuda.synchronize(painter.device)
            seconds.append(time.perf_counter() - begin)
    except torch.OutOfMemoryError:
        return row.model_copy(update={"fault": "out of memory"})
    except Exception as fault:  # a compiler's, or a pipeline's that does not draw this size
        if row.way == "plain" and row.batch == 1:
            raise UserError(
                f"{painter.teacher.path} cannot draw {row.size} x {row.size} pixels ({brief(fault)})"
            ) from None
        return row.model_copy(update={"fault": brief(fault)})
    peak = torch.cuda.max_memory_allocated(painter.device) / 2**30 if on_gpu else None
    return row.model_copy(update={"seconds": median(seconds[1:]) / row.batch, "peak_gib": peak})


def gains(rows: Sequence[Speed]) -> dict[tuple[str, str, int, int], float]:
    """How many times faster than the plain teacher: (model, way, size, batch) -> ratio of seconds."""
    teacher = {(row.size, row.batch): row.seconds for row in rows if row.model == "teacher" and row.way == "plain"}
    found = {}
    for row in rows:
        base = teacher.get((row.size, row.batch))
        if base and row.seconds:
            found[row.model, row.way, row.size, row.batch] = base / row.seconds
    return found


def _show(rows: Sequence[Speed]) -> None:
    table = Table("model", "way", "size", "batch", "s an image", "times faster", "peak, GiB", box=SIMPLE)
    faster: dict[Any, float] = gains(rows)
    for row in rows:
        gain = faster.get((row.model, row.way, row.size, row.batch))
        table.add_row(
            escape(row.model),
            row.way,
            str(row.size),
            str(row.batch),
            f"{row.seconds:.3g}" if row.seconds else escape(row.fault[:40]),
            f"{gain:.2f}" if gain else "-",
            f"{row.peak_gib:.2f}" if row.peak_gib else "-",
        )
    Console().print(table)
