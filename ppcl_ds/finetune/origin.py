"""Where a variant's units had been trained before it was fine-tuned."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from ppcl_ds.atomic import write_whole
from ppcl_ds.errors import UserError, brief
from ppcl_ds.recipe import TrainingFolder


class Origin(BaseModel):
    """`library.json` of a fine-tuning's folder.

    Attributes:
        checkpoint: the library's.
        step: training steps behind it.
    """

    checkpoint: Path
    step: int

    def write(self, folder: TrainingFolder) -> None:
        """Write it down; one rank alone."""
        write_whole(_file(folder), self.model_dump_json(indent=1) + "\n")


def read_origin(folder: TrainingFolder) -> Origin:
    """The origin of a fine-tuning.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return Origin.model_validate_json(_file(folder).read_bytes())
    except (OSError, ValidationError) as fault:
        why = brief(fault)
        raise UserError(f"{_file(folder)} cannot be read ({why}); move {folder.path} away to fine-tune anew") from None


def _file(folder: TrainingFolder) -> Path:
    return folder.path / "library.json"
