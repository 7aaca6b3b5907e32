"""What a fine-tuning starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from ppcl_ds.atomic import atomic_write
from ppcl_ds.errors import UserError, brief
from ppcl_ds.recipe import Recipe, TrainingFolder
from ppcl_ds.sections import Finetune
from ppcl_ds.teacher.files import Sources
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.checkpoint import Checkpoint, unit_sources
from ppcl_ds.units.kinds import blank_unit
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.units.variant import Layout, layout


@dataclass(frozen=True)
class Library:
    """Trained units.

    Attributes:
        checkpoint: of their training.
        trained: the plan of that training.
    """

    checkpoint: Checkpoint
    trained: Plan


@dataclass(frozen=True)
class Start:
    """Everything that fine-tuning starts from, in order.

    Attributes:
        library: where the units were trained; None: the variant has a checkpoint of its own to go on from.
    """

    recipe: Recipe
    settings: Finetune
    variant: str
    plan: Plan
    teacher: Teacher
    library: Library | None

    @property
    def folder(self) -> TrainingFolder:
        return self.recipe.finetuning(self.variant)

    def units(self, unit: UnitPlan) -> Sources:
        """A unit's tensors as its library left them; zeros where they will come from the variant's own checkpoint."""
        if self.library is None:
            return blank_unit(unit, self.teacher)
        return unit_sources(self.library.checkpoint, self.library.trained, unit)

    def layout(self, dtype: torch.dtype | None = None) -> Layout:
        return layout(self.teacher, self.plan, self.variant, self.units, dtype)


class Origin(BaseModel):
    """`library.json` of a fine-tuning's folder.

    Attributes:
        checkpoint: the library's.
        step: training steps before it.
    """

    checkpoint: Path
    step: int

    def write(self, folder: TrainingFolder) -> None:
        atomic_write(_file(folder), self.model_dump_json(indent=1) + "\n")


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
