"""How far a run is: every step of the road, what it needs next, from what lies in its folder; no Slurm, no torch."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ppcl_ds.early import variants_in
from ppcl_ds.recipe import Recipe, TrainingFolder
from ppcl_ds.reporting import Report, of_step, read_report
from ppcl_ds.steps import Step, due, steps
from ppcl_ds.watch.lock import holder

State = Literal["done", "running", "stopped", "failed", "next", "later"]


@dataclass(frozen=True)
class StepStatus:
    """One step, or one variant's fine-tuning.

    Attributes:
        name: such as `distill`, or `finetune small`.
        state: `stopped` before its end, on request or without a word: the same command goes on. `next` could begin now.
        command: that does it.
        checkpoint: newest, of a training.
        checkpoint_age: seconds since it was written.
        fault: that has ended its newest start.
    """

    name: str
    state: State
    command: str
    step: int = 0
    total: int = 0
    loss: float | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint: str = ""
    checkpoint_age: float | None = None
    fault: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        running = self.state == "running"
        return (
            self.name,
            self.state,
            f"{self.step} of {self.total}" if self.total else "",
            "" if self.loss is None else f"{self.loss:.4g}",
            f"{self.samples_per_second:.3g}" if self.samples_per_second else "",
            span(self.seconds_left) if running and self.seconds_left is not None else "",
            f"{self.checkpoint}, {span(self.checkpoint_age or 0)} ago" if self.checkpoint else "",
        )


@dataclass(frozen=True)
class RunStatus:
    """A run.

    Attributes:
        disk_bytes: what its folder takes on disk.
        next: the command that comes next; empty: something runs, or all is done.
    """

    run: str
    steps: tuple[StepStatus, ...]
    disk_bytes: int
    next: str = ""

    @property
    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def told(self, faults: Mapping[str, str]) -> RunStatus:
        """The same, but of a step that has failed the fault that is known of all its ranks, not of the first alone."""
        known = {step: faults.get(step.name, step.fault) if step.fault else "" for step in self.steps}
        return replace(self, steps=tuple(replace(step, fault=fault) for step, fault in known.items()))

    @property
    def faults(self) -> list[str]:
        """What has ended steps, a line each."""
        return [f"{step.name}: {step.fault}" for step in self.steps if step.fault]

    @property
    def shown(self) -> RenderableType:
        """For a terminal."""
        table = Table("step", "state", "progress", "loss", "samples/s", "left", "newest checkpoint")
        for step in self.steps:
            table.add_row(*map(escape, step.cells))
        lines = [*self.faults, f"{self.run}: {gigabytes(self.disk_bytes)} on disk"]
        if self.next:
            lines.append(f"next: {self.next}")
        elif all(step.state == "done" for step in self.steps):
            lines.append(f"every step is done; look at {self.run}/report.html")
        return Group(table, *(Text(line) for line in lines))


def look(recipe: Recipe, named: str, parts: int = 0) -> RunStatus:
    """How a run is now.

    Args:
        named: the recipe, as it can be typed.
        parts: of the probe, where jobs share it.
    """
    names = variants_in(recipe.plan_file) or list(recipe.plan.variants)
    table = steps(recipe, names, parts)
    open_still = {step.name for step in due(table, None)}
    found = [each for step in table for each in _status(recipe, step, step.name in open_still, named)]
    ready = next((number for number, each in enumerate(found) if each.state != "done"), None)
    if ready is not None and found[ready].state == "later":
        found[ready] = replace(found[ready], state="next")
    busy = any(each.state == "running" for each in found)
    following = found[ready].command if ready is not None and not busy else ""
    return RunStatus(str(recipe.run), tuple(found), disk_bytes(recipe.run), following)


def _status(recipe: Recipe, step: Step, open_still: bool, named: str) -> Iterator[StepStatus]:
    if step.name == "distill":
        yield _training(step.name, recipe.distillation, recipe.distill.steps, _command(step, named))
    elif step.name == "finetune":
        for variant in step.variants:
            command = f"{_command(step, named)} --variant {shlex.quote(variant)}"
            yield _training(f"finetune {variant}", recipe.finetuning(variant), recipe.tuning.steps, command)
    else:
        report = read_report(of_step(recipe.run, step.name))
        known = report.model_dump(include={"step", "total", "samples_per_second", "seconds_left", "fault"})
        state = _state(report, report.alive, not open_still)
        shown = known if state in ("running", "stopped", "failed") else {}
        yield StepStatus(step.name, state, _command(step, named), **shown)


def _training(name: str, folder: TrainingFolder, total: int, command: str) -> StepStatus:
    report = read_report(folder.progress)
    running = report.state == "running" and bool(holder(folder.path))
    latest = folder.checkpoints / "latest"
    tag = latest.read_text().strip() if folder.begun else ""
    reached = int(tag.rpartition("-")[2]) if tag.rpartition("-")[2].isdecimal() else 0
    done = folder.finished(total)
    return StepStatus(
        name,
        _state(report, running, done, folder.begun),
        command,
        step=report.step if running else reached,
        total=total if report.total or folder.begun else 0,
        loss=report.loss,
        samples_per_second=report.samples_per_second,
        seconds_left=report.seconds_left,
        checkpoint=tag,
        checkpoint_age=time.time() - latest.stat().st_mtime if tag else None,
        fault="" if running or done else report.fault,
    )


def _state(report: Report, running: bool, done: bool, begun: bool = False) -> State:
    if running:
        return "running"
    if done:
        return "done"
    if report.state == "failed":
        return "failed"
    ended_early = report.state in ("running", "stopped") and (report.process or report.total)
    return "stopped" if begun or ended_early else "later"


def _command(step: Step, named: str) -> str:
    program = "ppcl-data" if step.name in ("shard", "encode") else "ppcl"
    name = "probe --merge" if step.name == "merge" else step.name
    return f"{program} {name} {named}"


def disk_bytes(folder: Path) -> int:
    """What a folder takes on disk, holes of sparse files not counted, nor what vanishes meanwhile."""
    total, folders = 0, [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue
    return total


def gigabytes(size: int) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    value, units = float(size), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def span(seconds: float) -> str:
    """Seconds as `0:01:30`."""
    return str(timedelta(seconds=int(seconds)))
