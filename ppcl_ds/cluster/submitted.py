"""What has been submitted for a run, as its folder remembers it; and its end by `ppcl cancel`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from ppcl_ds.atomic import atomic_write
from ppcl_ds.cluster import slurm
from ppcl_ds.errors import UserError


class Queued(BaseModel):
    """A step and the number of its job or job array."""

    step: str
    job: str


_CHAIN = TypeAdapter(list[Queued])


def folder_of(run: Path) -> Path:
    """What `ppcl submit` writes of a run."""
    return run / "slurm"


def read_chain(run: Path) -> list[Queued]:
    """The newest chain that was submitted for a run folder; empty before the first.

    Raises:
        UserError: the file that says so is damaged.
    """
    path = folder_of(run) / "jobs.json"
    try:
        return _CHAIN.validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except ValidationError:
        raise UserError(f"{path} is damaged; remove it once none of the run's jobs is in the queue") from None


def write_chain(run: Path, chain: Sequence[Queued]) -> None:
    """Remember the newest chain."""
    atomic_write(folder_of(run) / "jobs.json", _CHAIN.dump_json(list(chain), indent=1))


def need_chain(run: Path) -> list[Queued]:
    """The newest chain.

    Raises:
        UserError: there is none, or no Slurm.
    """
    slurm.need_slurm()
    if chain := read_chain(run):
        return chain
    raise UserError(f"{run}: nothing has been submitted (there is no {folder_of(run)}/jobs.json); give the run folder")


def cancel(run: Path) -> None:
    """Cancel what is left of a run's newest chain.

    Raises:
        UserError: there is none.
    """
    chain = need_chain(run)
    alive = {job.array for job in slurm.jobs_of([each.job for each in chain]) if not job.over}
    slurm.cancel(sorted(alive))
    for each in chain:
        print(f"{each.step} ({each.job}): {'cancelled' if each.job in alive else 'was over'}")
