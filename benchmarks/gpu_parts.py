"""What a step on GPUs is made of, part by part: tasks for the ranks of `benchmarks/gpu.py`.

Each joins the other ranks by itself and answers with what JSON can hold. Lists are of repeated measurements, taken in
turns; a task's sides run in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.plain import Latents, PlainStudents
from benchmarks.ranks import THREADS
from benchmarks.step import WARM_UP, EngineStep, seconds_of
from benchmarks.workload import Workload

Times = dict[str, list[list[float]]]


def where() -> str:
    """The device in words."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"the CPU, {THREADS} thread"
    return f"{name}, torch {torch.__version__}"


def teacher_forwards(recipe: str, work: dict[str, Any], buckets: Sequence[int | None], repeats: int) -> Times:
    """A forward of the stock teacher, and of the sharded one with each bucket of elements that are gathered ahead.

    Args:
        buckets: `stage3_prefetch_bucket_size`; None: what the product chooses.

    Returns:
        `seconds` until it has been computed, and `host` until the host has asked for all of it: a list a side.
    """
    from ppcl_ds import launch
    from ppcl_ds.recipe import load_recipe, teacher_config
    from ppcl_ds.teacher.sharded import load_teacher
    from ppcl_ds.teacher.teacher import open_teacher

    device, load, loaded = launch.join(), Workload(**work), load_recipe(Path(recipe))
    teacher = open_teacher(loaded)
    plain = PlainStudents(teacher.files.folder, [], load.dtype, device)
    batch = Latents.random(load, torch.Generator().manual_seed(dist.get_rank()), device)
    sides: list[Callable[[], object]] = [partial(plain.forward, batch)]
    for bucket in buckets:
        config = teacher_config(loaded)
        if bucket is not None:
            zero = config["zero_optimization"] | {"stage3_prefetch_bucket_size": bucket}
            config = config | {"zero_optimization": zero}
        sides.append(partial(_as_plain, load_teacher(teacher, config, load.dtype, None), plain, batch))
    found: Times = {"seconds": [], "host": []}
    for turn in range(WARM_UP + repeats):
        pairs = [_timed(side) for side in sides]
        if turn >= WARM_UP:
            found["seconds"].append([seconds for seconds, _ in pairs])
            found["host"].append([host for _, host in pairs])
    launch.leave()
    return {name: [list(side) for side in zip(*turns, strict=True)] for name, turns in found.items()}


def _as_plain(sharded: Any, plain: PlainStudents, batch: Latents) -> Tensor:
    """The same call of another transformer."""
    own, plain.teacher = plain.teacher, sharded
    try:
        return plain.forward(batch)
    finally:
        plain.teacher = own


def _timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds until it is done, and until the host has gone through it."""
    host = 0.0

    def watched() -> None:
        nonlocal host
        began = time.perf_counter()
        action()
        host = time.perf_counter() - began

    return seconds_of(watched), host


def masks(recipe: str, work: dict[str, Any], repeats: int) -> list[list[float]]:
    """Seconds of a stock teacher forward with a mask of its captions' padding, and without one."""
    from ppcl_ds import launch
    from ppcl_ds.recipe import load_recipe

    device, load = launch.join(), Workload(**work)
    plain = PlainStudents(load_recipe(Path(recipe)).teacher.path / "transformer", [], load.dtype, device)
    batch = Latents.random(load, torch.Generator().manual_seed(0), device)
    mask = torch.ones(batch.embeds.shape[:2], dtype=torch.bool, device=device)
    mask[0, -1] = False
    sides = [partial(plain.forward, batch, mask), partial(plain.forward, batch)]
    turns = [[_timed(side)[0] for side in sides] for _ in range(WARM_UP + repeats)][WARM_UP:]
    launch.leave()
    return [list(side) for side in zip(*turns, strict=True)]


def phases(recipe: str, steps: int) -> dict[str, float]:
    """A step's seconds by phase on this rank, by the product's own timer, the mean of so many; `step`: all of it.

    On a GPU also `allocated` and `reserved`, the most bytes of tensors and of what torch holds for them, and `retries`,
    how often torch had to give that back and ask again.
    """
    from ppcl_ds import launch

    launch.join()
    engine = EngineStep(Path(recipe))
    for _ in range(WARM_UP):
        engine()
    engine.trainer.timer.drain()
    seconds = sum(seconds_of(engine) for _ in range(steps)) / steps
    found = {name: value / steps for name, value in engine.trainer.timer.drain().items()} | {"step": seconds}
    if torch.cuda.is_available():
        found["allocated"] = torch.cuda.max_memory_allocated()
        found["reserved"] = torch.cuda.max_memory_reserved()
        found["retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
    launch.leave()
    return found
