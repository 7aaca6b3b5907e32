"""Weights & Biases: what TensorBoard is given of a training, once more, for those who watch their runs there."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ppcl_ds.atomic import atomic_write
from ppcl_ds.errors import UserError, brief, shown
from ppcl_ds.recipe import Recipe, TrainingFolder

if TYPE_CHECKING:
    import numpy as np


def check_package(recipe: Recipe) -> None:
    """That what the recipe's key `wandb` needs is installed.

    Raises:
        UserError: it is not.
    """
    if recipe.wandb and find_spec("wandb") is None:
        raise UserError("recipe key 'wandb': its package is not here; pip install 'ppcl-ds[wandb]', or delete the key")


class Mirror:
    """A training's run at Weights & Biases, which a later start goes on with; made by rank 0 alone.

    Points have the training's step as their axis; a step that is done again after a restart may stand there twice.

    Args:
        recipe: its key `wandb` says where; all of it becomes the run's configuration.
        folder: of the training; `wandb_id` in it is the run's.

    Raises:
        UserError: Weights & Biases does not take it, as without a login.
    """

    def __init__(self, recipe: Recipe, folder: TrainingFolder) -> None:
        import wandb

        settings = recipe.wandb
        assert settings is not None, "who has no key has no mirror"
        self.image: Any = wandb.Image
        note = folder.path / "wandb_id"
        if not note.exists():
            atomic_write(note, secrets.token_hex(4))
        name = " ".join(filter(None, (settings.name or recipe.run.name, folder.command, folder.variant)))
        try:
            self.run: Any = wandb.init(
                project=settings.project,
                entity=settings.entity or None,
                name=name,
                id=note.read_text(),
                resume="allow",
                mode=settings.mode,
                dir=str(folder.path),
                config=recipe.model_dump(mode="json"),
            )
        except Exception as fault:  # whatever its releases raise
            raise UserError(f"wandb: {shown(brief(fault), 200)}; `wandb login`, or wandb.mode: offline") from None
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""
        self.run.log({"step": step, **values})

    def images(self, step: int, strips: Mapping[str, np.ndarray]) -> None:
        """Pictures of a step, uint8 (H, W, C), by name."""
        self.run.log({"step": step, **{name: self.image(strip) for name, strip in strips.items()}})

    def close(self) -> None:
        """Send what has not been sent."""
        self.run.finish()
