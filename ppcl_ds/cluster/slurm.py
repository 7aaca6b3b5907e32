"""The Slurm commands: the only place that runs them. Nothing here needs accounting (sacct)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ppcl_ds.errors import UserError

_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol")
_FORMAT = "%F|%i|%T|%L|%r"
"""Of squeue: job, or that of the array; job or array task; state; time left to the limit; why it waits."""

_OVER = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "LAUNCH_FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "RECONFIG_FAIL",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States that a job does not leave (squeue's manual, "Job State Codes")."""


@dataclass(frozen=True)
class Job:
    """A job, or a task of a job array, as the controller knows it."""

    array: str
    """Number that sbatch gave: the job's, or that of the array it belongs to."""
    number: str
    """`123`, or `123_4` for a task of an array."""
    state: str
    left: str
    """Until its time limit; `0:00` and the like where it does not run."""
    reason: str

    @property
    def over(self) -> bool:
        return self.state in _OVER


def need_slurm() -> None:
    """Be sure that there is a Slurm.

    Raises:
        UserError: a command is not there.
    """
    if missing := [name for name in _COMMANDS if not shutil.which(name)]:
        raise UserError(f"{missing[0]} is not on the PATH; run this where Slurm's commands are, such as a login node")


def submit(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Queue a job; returns its number.

    Raises:
        UserError: Slurm does not want it.
    """
    return _run("sbatch", "--parsable", *arguments, environment=environment).strip().partition(";")[0]


def test_only(arguments: Sequence[str]) -> None:
    """Ask Slurm whether it would take a job; none is queued.

    Raises:
        UserError: it would not, as with an unknown partition.
    """
    _run("sbatch", "--test-only", *arguments)


def version() -> str:
    """Slurm's, as it says it."""
    return _run("sbatch", "--version").strip()


def jobs_of(numbers: Sequence[str]) -> list[Job]:
    """What the controller still knows of these jobs, a `Job` each array task; it forgets finished ones in minutes."""
    if not numbers:
        return []
    try:
        listed = _run("squeue", "--noheader", "--array", "--states=all", f"--format={_FORMAT}", _ids("jobs", numbers))
    except UserError as fault:
        if "Invalid job id" in str(fault):  # it knows none of them
            return []
        raise
    return [Job(*line.split("|", 4)) for line in listed.splitlines()]


def cancel(numbers: Sequence[str]) -> None:
    """Cancel jobs, whatever they are doing."""
    if numbers:
        _run("scancel", *numbers)


def _ids(option: str, numbers: Sequence[str]) -> str:
    return f"--{option}={','.join(numbers)}"


def _run(program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=os.environ | (environment or {}))
    if done.returncode:
        words = "; ".join(
            line.removeprefix(f"{program}: ").removeprefix("error: ") for line in done.stderr.splitlines() if line
        )
        raise UserError(f"{program}: {words or f'exit code {done.returncode}'}")
    return done.stdout
