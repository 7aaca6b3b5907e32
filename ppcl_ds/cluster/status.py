"""`ppcl status`: how the jobs of a run are, from Slurm's queue and from what they have printed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ppcl_ds.cluster import slurm
from ppcl_ds.cluster.submitted import Queued, folder_of, need_chain

_TAIL = 1 << 18
"""Bytes at the end of a log that are looked at."""
_RANK = r"(?:\[rank ?\d+\]:? ?)*"
"""What torchrun puts before a line of a rank, and torch before one of a traceback."""
_START = re.compile(r"^start \d+, ", re.MULTILINE)
_PROGRESS = re.compile(
    rf"^{_RANK}[^\n:]+: (\d+) of (\d+), \S.*? elapsed(?:, (?P<left>[^;\n]+) remaining)?(?:; (?P<note>.*))?$",
    re.MULTILINE,
)
_RATE = re.compile(r"(\S+) samples/s")
_FAULT = re.compile(rf"^{_RANK}((?:error: |[\w.]*(?:Error|Exception|Interrupt)\b).*)$", re.MULTILINE)
"""Our own last words, or the last line of a traceback."""
_ENDED = re.compile(r"^srun: error: (\S+): tasks? .*: (Killed|Out Of Memory|Exited with .*)$", re.MULTILINE)
_SIGNAL = re.compile(
    r"^ +host +: (\S+)\n +rank +: (\d+) .*\n +exitcode .*\n.*\n +traceback : (Signal (?!15\b).*)$", re.MULTILINE
)
"""What torchrun says of a rank that had no last words."""
_SLURM = re.compile(r"^slurmstepd\S*: error: \*\*\* (.*) \*\*\*$", re.MULTILINE)


@dataclass(frozen=True)
class Report:
    """What one job, or all tasks of an array together, have printed since their last start."""

    starts: int
    step: str
    complete: bool
    rate: str
    left: str
    fault: str


def status(run: Path) -> None:
    """Print a line a step, and for those that have failed the first error of the first rank that did.

    Raises:
        UserError: nothing was submitted, or Slurm does not answer.
    """
    chain = need_chain(run)
    jobs = slurm.jobs_of([queued.job for queued in chain])
    table = Table("step", "job", "state", "progress", "samples/s", "left", "limit in", "starts")
    faults = []
    for queued in chain:
        own = [job for job in jobs if job.array == queued.job]
        report = _report(folder_of(run) / "logs", queued)
        limit = min((job.left for job in own if job.state == "RUNNING"), default="")
        cells = (
            queued.step,
            queued.job,
            _state(own),
            report.step,
            report.rate,
            report.left,
            limit,
            str(report.starts or ""),
        )
        table.add_row(*map(escape, cells))
        well = all(job.state in ("RUNNING", "COMPLETED") for job in own) if own else report.complete
        if report.fault and not well:
            faults.append(f"{queued.step}: {report.fault}")
    console = Console()
    console.print(table)
    for fault in faults:
        console.print(fault, markup=False, soft_wrap=True, highlight=False)


def _state(jobs: Sequence[slurm.Job]) -> str:
    if not jobs:
        return "forgotten by Slurm"
    words = Counter(f"{job.state} ({job.reason})" if job.state == "PENDING" else job.state for job in jobs)
    if len(jobs) == 1:
        return next(iter(words))
    return ", ".join(f"{count} {word}" for word, count in words.items())


def _report(logs: Path, queued: Queued) -> Report:
    outs = sorted(logs.glob(f"{queued.step}-{queued.job}.out")) + sorted(logs.glob(f"{queued.step}-{queued.job}_*.out"))
    texts = {out: _since_start(_tail(out)) for out in outs}
    found = {out: [*_PROGRESS.finditer(text)] for out, text in texts.items()}
    last = [matches[-1] for matches in found.values() if matches]
    done, total = (sum(int(match[place]) for match in last) for place in (1, 2))
    rates = [rate[1] for match in last if (rate := _RATE.search(match["note"] or ""))]
    starts = {out: _starts(out) for out in outs}
    faults = [fault for out, text in texts.items() if (fault := _first_fault(text, starts[out]))]
    return Report(
        starts=max(map(len, starts.values()), default=0),
        step=f"{done} of {total}" if last else "",
        complete=bool(last) and done == total,
        rate=rates[-1] if rates else "",
        left=(last[-1]["left"] or "") if last else "",
        fault=faults[0] if faults else "",
    )


def _starts(out: Path) -> list[Path]:
    """The folders of the ranks' logs, one a start, of the job that prints to `out`."""
    return sorted(out.with_suffix("").glob("start-*"), key=lambda folder: int(folder.name.removeprefix("start-")))


def _first_fault(text: str, starts: Sequence[Path]) -> str:
    """The first error of the first rank that had one: what was killed without a word comes before what that broke.

    Args:
        text: what the job has printed since its last start.
        starts: the folders of its ranks' logs.
    """
    # Where a launcher has left with an error of its own, srun itself kills the others.
    if (ended := _ENDED.search(text)) and not ended[2].startswith("Exited"):
        return f"{ended[1]}: the launcher was killed"
    if died := _SIGNAL.search(text):
        return f"rank {died[2]} on {died[1]}: {died[3]}"
    found = starts[-1].glob("*/*/attempt_0/*/stderr.log") if starts else ()
    logs = sorted(found, key=lambda log: log.stat().st_mtime_ns)
    for log in logs:  # who failed first has written last before the others
        if fault := _FAULT.search(_tail(log)):
            return f"{log.parents[3].name}, local rank {log.parent.name}: {fault[1]}"
    if fault := _FAULT.search(text) or _SLURM.search(text):
        return fault[1]
    return ""


def _since_start(text: str) -> str:
    """A job that was requeued appends to its file; only its last start tells how it is."""
    starts = [*_START.finditer(text)]
    return text[starts[-1].start() :] if starts else text


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return file.read().decode(errors="replace")
