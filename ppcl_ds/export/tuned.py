"""Fine-tuned variants: their names, and what came of the training, put into the variant that it started from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ppcl_ds.distill.checkpoint import Checkpoint, newest_checkpoint
from ppcl_ds.distill.trained import sources_of
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.sources import Source, Sources, held
from ppcl_ds.finetune.origin import Origin, read_origin
from ppcl_ds.planning.building import rehearse_unit
from ppcl_ds.planning.plan import FINETUNED, UnitPlan
from ppcl_ds.recipe import TrainingFolder


def finetuned(variant: str) -> str:
    """What a variant is called after fine-tuning."""
    return variant + FINETUNED


def untuned(name: str) -> str:
    """The plan's variant, whether it has been fine-tuned or not."""
    return name.removesuffix(FINETUNED)


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning left of a variant."""

    checkpoint: Checkpoint
    origin: Origin

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
    return Tuned(newest_checkpoint(folder.checkpoints), read_origin(folder))


def unit_shapes(unit: UnitPlan, teacher: nn.Module, anatomy: Anatomy) -> Sources:
    """A unit's tensors on the meta device, for a layout whose units all come from somewhere else.

    Args:
        teacher: on the meta device.
    """
    return held(rehearse_unit(unit, teacher, anatomy, next(teacher.parameters()).dtype).core.state_dict())
