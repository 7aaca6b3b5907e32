"""How a command is doing, in a small file that others read: `ppcl status`, a person, a script.

A training keeps `progress.json` in its folder. Another step of the road keeps `progress/STEP.json` in the run folder,
or beside the log of its job, if `ppcl submit` has queued it. Rank 0 writes it; of the other ranks only the last words
are kept, in torchrun's own error files.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ppcl_ds import launch
from ppcl_ds.atomic import atomic_write

State = Literal["running", "done", "stopped", "failed"]


class Report(BaseModel):
    """The content of the file.

    Attributes:
        state: `stopped` is on request; started again, it goes on. What was killed says `running` for ever; the file's
            age tells.
        what: is counted.
        loss: the newest one that was logged; None of what has none.
        samples_per_second: None where nobody measures it.
        seconds_left: None where it cannot be told yet, or nothing is left.
        fault: what has ended it, in one line.
        job: Slurm's number of the job, or of the array that it is a task of; empty where there is none.
        process: `PID on HOST` that keeps the report.
    """

    state: State = "running"
    what: str = ""
    step: int = 0
    total: int = 0
    loss: float | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    fault: str = ""
    job: str = ""
    process: str = ""

    @property
    def alive(self) -> bool:
        """Whether the process that keeps the report may still be there; of another machine's nobody knows."""
        number, _, host = self.process.partition(" on ")
        if self.state != "running" or not number.isdecimal():
            return False
        return host != socket.gethostname() or Path("/proc", number).exists()


class Reporter:
    """Keeps the report of the command that runs in this process.

    Args:
        path: of the file; None: there is none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if launch.is_first_rank() else None
        job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID", "")
        self.report = Report(job=job, process=f"{os.getpid()} on {socket.gethostname()}")

    def update(self, **changes: Any) -> None:
        self.report = self.report.model_copy(update=changes)
        if self.path is not None:
            with suppress(OSError):  # a full disk does not end a run that could go on
                atomic_write(self.path, self.report.model_dump_json(indent=1) + "\n")

    def fail(self, fault: str) -> None:
        """Leave this process's last words; those of a rank also where torchrun looks for them."""
        self.update(state="failed", fault=fault, seconds_left=None)
        if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with suppress(OSError):
                reply = {"message": {"message": fault, "extraInfo": {"timestamp": str(int(time.time()))}}}
                atomic_write(Path(error_file), json.dumps(reply))


own = Reporter()
"""This process's."""


def keep_in(path: Path | None) -> Reporter:
    """Keep this process's report in another file, from its next change on."""
    global own
    own = Reporter(path)
    return own


def of_step(run: Path, step: str) -> Path:
    """The file of a step that is no training."""
    return run / "progress" / f"{step}.json"


def of_job() -> Path | None:
    """The file beside the log of a job that `ppcl submit` has queued; None: this is no such job."""
    if "PPCL_SLURM" not in os.environ or "SLURM_JOB_ID" not in os.environ:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    return Path(os.environ["PPCL_SLURM"], "logs", f"{job}.json")


def last_words(error_file: Path) -> str:
    """What a rank has left where torchrun looks for it; empty where nothing can be read."""
    try:
        return str(json.loads(error_file.read_text())["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def read_report(path: Path) -> Report:
    """What a file says; nothing where there is none that can be read."""
    try:
        return Report.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return Report()
