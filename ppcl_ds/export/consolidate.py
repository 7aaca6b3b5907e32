"""`ppcl consolidate`: from a run's checkpoint to a diffusers folder that stock tools load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from diffusers import ModelMixin
from torch import Tensor

from ppcl_ds.errors import UserError
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.families.surgery import assemble
from ppcl_ds.planning.plan import Plan, UnitPlan
from ppcl_ds.whole import whole_folder

_LAYER_PREFIX = "unit.block."
"""In front of a unit's tensors in a checkpoint; what follows is the name in the teacher's block class."""


def newest_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    try:
        return folder / (folder / "latest").read_text().strip()
    except OSError:
        raise UserError(f"no checkpoint in {folder}; run `ppcl distill` first") from None


def unit_state(checkpoint: Path, trained: Plan, unit: UnitPlan) -> dict[str, Tensor]:
    """A trained unit's tensors, named as in the teacher's block class.

    Args:
        trained: the plan that the checkpoint was trained with.

    Raises:
        UserError: the unit was not trained in that run, or its file is missing.
    """
    if unit not in trained.units:
        raise UserError(f"unit '{unit.name}' on blocks {list(unit.span)} was not trained in {checkpoint.parent.parent}")
    layer = trained.units.index(unit)
    path = checkpoint / f"layer_{layer:02d}-model_states.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError) as fault:
        why = str(fault).splitlines()[0]
        raise UserError(f"checkpoint {checkpoint}: {path.name} of unit '{unit.name}' cannot be read: {why}") from None
    return {key.removeprefix(_LAYER_PREFIX): tensor for key, tensor in state.items()}


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
