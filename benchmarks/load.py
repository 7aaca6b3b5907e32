"""Memory while the teacher loads: how much each of 1, 2 and 4 ranks grows, against the size of the whole model.

    python -m benchmarks.load [--json FILE] [--quick]

What counts is anonymous memory: what the process itself has written, sampled every few milliseconds. Pages of the
safetensors files are mapped, shared by all ranks of a machine and given back when memory is short, so they are told
apart: resident memory in the notes is with them.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.ranks import run_ranks
from benchmarks.table import JsonFile, Quick, Row, row, show
from benchmarks.workload import save_pipeline
from ppcl_ds.teacher.teacher import Teacher

MIB = 2**20
CONFIG: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": 16,
    "attention_head_dim": 128,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}
"""Qwen-Image's own configuration but for its depth and its width."""
WIDTH = 1024


class Sampler(threading.Thread):
    """Watches this process's memory.

    Attributes:
        before: bytes when it began, by kind: `RssAnon` written by the process, `VmRSS` with the pages of mapped files.
        peak: most bytes since.
    """

    def __init__(self, seconds: float = 0.002) -> None:
        super().__init__(daemon=True)
        self.seconds, self._over = seconds, threading.Event()
        self.before = memory_now()
        self.peak = dict(self.before)
        self.start()

    def run(self) -> None:
        """Sample until `growth` is asked for."""
        while not self._over.wait(self.seconds):
            self._look()

    def growth(self) -> dict[str, int]:
        """Ends the watch; peak less beginning, by kind."""
        self._over.set()
        self.join()
        self._look()
        return {kind: value - self.before[kind] for kind, value in self.peak.items()}

    def _look(self) -> None:
        self.peak = {kind: max(value, self.peak[kind]) for kind, value in memory_now().items()}


def memory_now() -> dict[str, int]:
    """Bytes this process holds, by kind."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(fields[kind].split()[0]) * 1024 for kind in ("RssAnon", "VmRSS")}


def growth(folder: str, dtype: str) -> dict[str, int]:
    """Most bytes that loading the teacher added to this rank, by kind of memory; every rank must call this."""
    from ppcl_ds import launch

    launch.join()
    from ppcl_ds.recipe import read_deepspeed_file
    from ppcl_ds.shipped import shipped
    from ppcl_ds.teacher.sharded import load_teacher

    teacher = Teacher(Path(folder))
    config = read_deepspeed_file(shipped("ds_configs/teacher_zero3.json"))
    sampler = Sampler()
    engine = load_teacher(teacher, config, getattr(torch, dtype), ranks_per_copy=None)
    grown = sampler.growth()
    parameters: list[Any] = list(engine.module.parameters())
    assert all(p.numel() == 0 or p.ds_persist for p in parameters)  # nothing is whole on a rank
    launch.leave()
    return grown


def save_teacher(folder: Path, layers: int, dtype: torch.dtype) -> int:
    """Write a random teacher in files of 200 MB; returns the bytes of its parameters."""
    size = {"num_attention_heads": WIDTH // CONFIG["attention_head_dim"], "num_layers": layers}
    return save_pipeline(folder, CONFIG | size, dtype, shard="200MB")


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Measure the growth of each rank's memory while the teacher loads."""
    layers = 4 if quick else 14
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        whole = save_teacher(Path(folder), layers, torch.bfloat16)
        for world in (1, 2, 4):
            found = run_ranks("benchmarks.load:growth", world, folder=folder, dtype="bfloat16")
            anonymous, resident = (max(each[kind] for each in found) / MIB for kind in ("RssAnon", "VmRSS"))
            name = f"growth while loading / model, {world} rank{'s' * (world > 1)}"
            note = f"bf16, {layers} blocks of width {WIDTH}; the worst rank; resident with mapped files {resident:.0f}"
            rows.append(row(name, anonymous, whole / MIB, "MiB", note))
    show("Memory while the teacher loads", rows, json)


if __name__ == "__main__":
    typer.run(main)
