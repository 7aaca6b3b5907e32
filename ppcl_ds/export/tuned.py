"""Fine-tuned variants: what came of the training, put into the variant that it started from."""

from __future__ import annotations

from dataclasses import dataclass

from ppcl_ds.errors import UserError, brief
from ppcl_ds.finetune.start import Origin, read_origin
from ppcl_ds.recipe import TrainingFolder, written_recipe
from ppcl_ds.sections import Finetune
from ppcl_ds.teacher.files import Source, Sources
from ppcl_ds.training.checkpoint import Checkpoint, newest_checkpoint, sources_of


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning left of a variant."""

    checkpoint: Checkpoint
    origin: Origin
    settings: Finetune

    @property
    def words(self) -> str:
        settings = self.settings
        losses = {
            "the teacher's velocity": settings.velocity_weight,
            "the data": settings.flow_weight,
            "the teacher's boundaries": settings.boundary_weight,
        }
        what, rest = {
            "all": ("the whole model was", ""),
            "neighbours": ("the units and what lies beside them were", " Everything else is the teacher's, unchanged."),
            "units": ("the units were", " Everything else is the teacher's, unchanged."),
        }[settings.trainable]
        against = " and ".join(words for words, weight in losses.items() if weight)
        return f"Then {what} trained end to end for {self.checkpoint.contents.step:,} steps, against {against}.{rest}"

    def put_into(self, tensors: Sources) -> dict[str, Source]:
        """The variant's tensors, those that were trained in the place of what they were before."""
        trained = [sources_of(self.checkpoint, part) for part in self.checkpoint.contents.units]
        found = {name: source.to(tensors[name].dtype) for part in trained for name, source in part.items()}
        return {**tensors, **found}


def open_tuned(folder: TrainingFolder) -> Tuned:
    """The newest checkpoint of a fine-tuning.

    Raises:
        UserError: it cannot be read.
    """
    try:
        settings = written_recipe(folder.recipe.read_bytes()).tuning
    except (OSError, ValueError) as fault:
        raise UserError(f"{folder.recipe} cannot be read ({brief(fault)})") from None
    return Tuned(newest_checkpoint(folder.checkpoints), read_origin(folder), settings)
