"""`ppcl consolidate`: from a run's checkpoint to a diffusers folder that stock tools load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from diffusers import ModelMixin
from torch import Tensor

from ppcl_ds.distill.checkpoint import Checkpoint
from ppcl_ds.errors import UserError
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.families.surgery import assemble
from ppcl_ds.planning.plan import Plan, UnitPlan
from ppcl_ds.whole import whole_folder


def unit_state(checkpoint: Checkpoint, trained: Plan, unit: UnitPlan) -> dict[str, Tensor]:
    """A trained unit's float32 masters, named as in the teacher's block class.

    Args:
        trained: the plan that the checkpoint was trained with.

    Raises:
        UserError: the unit was not trained in that run, or its file cannot be read.
    """
    if unit not in trained.units:
        where = checkpoint.folder.parent.parent
        raise UserError(f"unit '{unit.name}' on blocks {list(unit.span)} was not trained in {where}")
    return checkpoint.unit(unit.name)


Trained = Callable[[UnitPlan], Mapping[str, Tensor]]
"""Gives a unit's tensors, named as in the teacher's block class."""


def assembled(files: ModelFiles, anatomy: Anatomy, plan: Plan, variant: str, trained: Trained | None) -> ModelMixin:
    """A variant as a model of the teacher's stock class.

    Args:
        trained: None leaves each unit as it was before training, a copy of its span's first block.
    """
    places = [
        (origin, None if unit is None or trained is None else partial(trained, unit))
        for origin, unit in plan.places(variant)
    ]
    config, tensors = assemble(files, anatomy, places)
    model = files.empty_model(config)
    model.load_state_dict(tensors, assign=True)
    return model


def consolidate(files: ModelFiles, anatomy: Anatomy, plan: Plan, variant: str, trained: Trained, out: Path) -> None:
    """Write one variant as a diffusers transformer folder, in the number format of the teacher's files.

    Args:
        out: the folder to write; it appears whole, an older one is replaced.
    """
    model = assembled(files, anatomy, plan, variant, trained)
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
