"""TensorBoard: scalars and images of a run, gathered from all ranks, written by rank 0."""

from __future__ import annotations

import resource
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ppcl_ds import launch
from ppcl_ds.watch.mirror import Mirror


class TensorBoard:
    """A run's TensorBoard; every rank makes one, only rank 0 writes.

    Args:
        first: step of the first thing that will be written; what an earlier start wrote of it and of later ones is
            not shown any more.
        mirror: makes what is given all of it, too; called by rank 0.
    """

    def __init__(self, folder: Path, first: int = 1, mirror: Callable[[], Mirror] | None = None) -> None:
        self.mirror = mirror() if mirror and dist.get_rank() == 0 else None
        self.writer = SummaryWriter(str(folder), purge_step=first) if dist.get_rank() == 0 else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
        if self.mirror and values:
            self.mirror.scalars(step, values)

    def images(self, step: int, rows: Mapping[str, Tensor]) -> None:
        """Write one strip of images a model, `name -> (N, C, H, W) in [-1, 1]`; only rank 0's are used."""
        if self.writer is None:
            return
        strips = {
            f"samples/{name}": torch.cat(list(images.float().cpu().clamp(-1, 1) * 0.5 + 0.5), dim=-1)
            for name, images in rows.items()
        }
        for name, strip in strips.items():
            self.writer.add_image(name, strip, step)
        self.writer.flush()
        if self.mirror and strips:
            pixels = {name: (strip * 255).round().byte().permute(1, 2, 0).numpy() for name, strip in strips.items()}
            self.mirror.images(step, pixels)

    def close(self) -> None:
        """Nothing more will be written."""
        if self.writer is not None:
            self.writer.close()
        if self.mirror:
            self.mirror.close()


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Values of all ranks together, on every rank: the mean where several give the same name. Every rank must call."""
    columns: dict[str, list[float]] = defaultdict(list)
    for part in launch.all_gather(dict(values)):
        for name, value in part.items():
            columns[name].append(value)
    return {name: sum(column) / len(column) for name, column in columns.items()}


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that was written: name -> (step, value); of a step written twice (a resumed run), the later one."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: sorted({event.step: event.value for event in events.Scalars(name)}.items())
        for name in events.Tags()["scalars"]
    }


def peak_memory_gib() -> float:
    """The most memory this process has held, in GiB: the accelerator's where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_figures(rank: int) -> dict[str, float]:
    """What a rank writes down of its memory. On a GPU also what torch holds in reserve, and how often it had to give
    all of that back and ask again: more than a few times means that memory is short, and costs time."""
    own = {f"memory_gib/rank_{rank}": peak_memory_gib()}
    if torch.cuda.is_available():
        own[f"memory_reserved_gib/rank_{rank}"] = torch.cuda.max_memory_reserved() / 2**30
        own[f"memory_retries/rank_{rank}"] = float(torch.cuda.memory_stats()["num_alloc_retries"])
    return own


def unit_losses(scalars: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """The loss curves of the units, summed over streams: unit -> (step, loss)."""
    sums: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for name, points in scalars.items():
        unit, _, rest = name.partition("/")
        if rest.startswith("loss/"):
            for step, value in points:
                sums[unit][step] += value
    return {unit: sorted(points.items()) for unit, points in sums.items()}
