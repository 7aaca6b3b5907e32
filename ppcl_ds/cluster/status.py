"""`ppcl status`: how far a run is, and how its jobs are, from Slurm's queue and the reports that commands keep."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ppcl_ds.cluster import slurm
from ppcl_ds.cluster.road import look
from ppcl_ds.cluster.submitted import Queued, folder_of, read_chain
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe, TrainingFolder, load_recipe, open_run
from ppcl_ds.recipe_file import typed
from ppcl_ds.record import open_any, read_record
from ppcl_ds.reporting import Report, last_words, read_report

_COLUMNS = ("step", "job", "state", "progress", "samples/s", "left", "limit in", "starts")
_EVERY = 2.0
"""Seconds between two looks of --watch."""
_TAIL = 1 << 18
"""Bytes at the end of a log that are looked at."""
START = "==== start "
"""What `slurm/ranks.sh` prints before the ranks: a job that is requeued goes on in the same log."""
_ENDED = re.compile(r"^srun: error: (\S+): tasks? .*: (Killed|Out Of Memory|Exited with .*)$", re.MULTILINE)
"""What srun says of each launcher; where one has left with an error of its own, srun itself kills the others."""
_SIGNAL = re.compile(
    r"^ +host +: (\S+)\n +rank +: (\d+) .*\n +exitcode .*\n.*\n +traceback : (Signal (?!15\b).*)$", re.MULTILINE
)
"""What torchrun says of a rank that had no last words."""
_SLURM = re.compile(r"^slurmstepd\S*: error: \*\*\* (.*) \*\*\*$", re.MULTILINE)


@dataclass(frozen=True)
class Jobs:
    """One job, or all tasks of an array together: what Slurm knows, and what they have left behind.

    Attributes:
        known: to Slurm; it forgets them in minutes.
        reports: of each task, those of its newest start.
        outs: what each task has printed, over all its starts.
    """

    queued: Queued
    known: Sequence[slurm.Job]
    reports: Sequence[Report]
    outs: Sequence[Path]

    @property
    def step(self) -> tuple[int, int]:
        return sum(report.step for report in self.reports), sum(report.total for report in self.reports)

    @property
    def well(self) -> bool:
        """Whether nothing is wrong with them, as far as that is known."""
        if self.known:
            return all(job.state in ("RUNNING", "COMPLETED") for job in self.known)
        return bool(self.reports) and self.step[0] == self.step[1] and not any(each.fault for each in self.reports)

    @property
    def cells(self) -> tuple[str, ...]:
        done, total = self.step
        rates = [report.samples_per_second for report in self.reports if report.samples_per_second]
        left = [report.seconds_left for report in self.reports if report.seconds_left is not None]
        return (
            self.queued.step,
            self.queued.job,
            self._state(),
            f"{done} of {total}" if total else "",
            f"{rates[-1]:.3g}" if rates else "",
            str(timedelta(seconds=int(max(left)))) if left else "",
            min((job.left for job in self.known if job.state == "RUNNING"), default=""),
            str(max((len(_starts(out)) for out in self.outs), default=0) or ""),
        )

    def _state(self) -> str:
        if not self.known:
            return "forgotten by Slurm"
        words = Counter(f"{job.state} ({job.reason})" if job.state == "PENDING" else job.state for job in self.known)
        if len(self.known) == 1:
            return next(iter(words))
        return ", ".join(f"{count} {word}" for word, count in words.items())

    @property
    def last_fault(self) -> str:
        """What has ended them, where something is wrong."""
        return "" if self.well else self.fault

    @property
    def fault(self) -> str:
        """The first error of the first rank that had one; of other commands, their last words; else the log's."""
        fine = {job.number for job in self.known if job.state == "COMPLETED"}
        outs = [out for out in self.outs if out.stem.removeprefix(f"{self.queued.step}-") not in fine]
        faults = [*map(_fault, outs), *(report.fault for report in self.reports)]
        if self.known and all(job.over for job in self.known):
            faults += map(_last_line, outs)
        return next(filter(None, faults), "")


def status(path: Path, watch: bool = False, as_json: bool = False, changes: Sequence[str] = ()) -> None:
    """Print how a run is: a line a step, the command that comes next, and what is known of its Slurm jobs.

    Args:
        path: a recipe or a run folder.
        watch: print it anew every two seconds, until Ctrl-C.
        as_json: print it for programs instead.
        changes: of the recipe, see `load_recipe`.

    Raises:
        UserError: there is no such run, or Slurm does not answer.
    """
    recipe, named = _open(path, changes)
    if as_json:
        chain = _jobs(recipe.run)
        faults = _faults(chain)
        jobs = [
            dict(zip(_COLUMNS, each.cells, strict=True)) | {"fault": faults.get(each.queued.step, "")} for each in chain
        ]
        road = look(recipe, named, _parts(recipe)).told(faults)
        print(json.dumps(road.as_json | {"jobs": jobs}, indent=1))
        return
    console = Console()
    if not watch:
        console.print(_shown(recipe, named), soft_wrap=True, highlight=False)
        return
    with Live(_shown(recipe, named), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_EVERY)
            live.update(_shown(recipe, named), refresh=True)


def _open(path: Path, changes: Sequence[str]) -> tuple[Recipe, str]:
    """The recipe of a run, and how it is typed."""
    submitted = folder_of(path) / "recipe.yaml"
    if not path.is_dir() or changes:
        return open_run(path, changes), typed(path, changes)
    if submitted.exists():
        return load_recipe(submitted, [f"run={json.dumps(str(path))}"]), "RECIPE"
    if read_record(path).recipe or any(folder.recipe.exists() for folder in TrainingFolder.all_of(path)):
        return open_any(path), "RECIPE"
    raise UserError(f"{path}: no command has left its recipe here; give the recipe file")


def _parts(recipe: Recipe) -> int:
    """Those of the probe where jobs share it, as the recipe that they read says."""
    submitted = folder_of(recipe.run) / "recipe.yaml"
    if not read_chain(recipe.run) or not submitted.exists():
        return 0
    return load_recipe(submitted).cluster.probe_parts or 1


def _faults(chain: Sequence[Jobs]) -> dict[str, str]:
    """What has ended jobs, by their step: their logs know more of it than the report of the first rank."""
    return {each.queued.step: fault for each in chain if (fault := each.last_fault)}


def _shown(recipe: Recipe, named: str) -> RenderableType:
    chain = _jobs(recipe.run)
    faults = _faults(chain)
    road = look(recipe, named, _parts(recipe)).told(faults)
    parts = [road.shown]
    if read_chain(recipe.run) and not shutil.which("squeue"):
        parts.append(Text("jobs were submitted; of these, Slurm's commands tell, which are not on the PATH here"))
    elif chain:
        table = Table(*_COLUMNS)
        for each in chain:
            table.add_row(*map(escape, each.cells))
        lines = [f"{step}: {fault}" for step, fault in faults.items()]
        parts += [table, *(Text(line) for line in lines if line not in road.faults)]
    return Group(*parts)


def _jobs(run: Path) -> list[Jobs]:
    """The newest chain; empty where nothing was submitted, or there is no Slurm."""
    chain = read_chain(run)
    if not chain or not shutil.which("squeue"):
        return []
    known = slurm.jobs_of([queued.job for queued in chain])
    logs = folder_of(run) / "logs"
    files = [folder.progress for folder in TrainingFolder.all_of(run)] + sorted(logs.glob("*.json"))
    reports = [report for report in map(read_report, files) if report.total or report.fault]
    return [
        Jobs(
            queued,
            [job for job in known if job.array == queued.job],
            [report for report in reports if report.job == queued.job],
            sorted(logs.glob(f"{queued.step}-{queued.job}.out"))
            + sorted(logs.glob(f"{queued.step}-{queued.job}_*.out")),
        )
        for queued in chain
    ]


def _starts(out: Path) -> list[Path]:
    """The folders of the ranks' logs, one a start, of the job that prints to `out`."""
    return sorted(out.with_suffix("").glob("start-*"), key=lambda folder: int(folder.name.removeprefix("start-")))


def _fault(out: Path) -> str:
    """What ended a job's newest start: what was killed without a word comes before what that broke."""
    text = _tail(out).rpartition(START)[2]
    if (ended := _ENDED.search(text)) and not ended[2].startswith("Exited"):
        return f"{ended[1]}: the launcher was killed"
    if died := _SIGNAL.search(text):
        return f"rank {died[2]} on {died[1]}: {died[3]}"
    found = starts[-1].glob("*/*/attempt_0/*/error.json") if (starts := _starts(out)) else ()
    for file in sorted(found, key=lambda file: file.stat().st_mtime_ns):  # who failed first has written first
        if words := last_words(file):
            return f"{file.parents[3].name}, local rank {file.parent.name}: {words}"
    cancelled = _SLURM.search(text)
    return cancelled[1] if cancelled else ""


def _last_line(out: Path) -> str:
    """Of a job's log, what Slurm has added left out."""
    lines = [line for line in _tail(out).splitlines() if line and not line.startswith(("srun: ", "slurmstepd"))]
    return lines[-1] if lines else ""


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return file.read().decode(errors="replace")
