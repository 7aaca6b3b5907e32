"""The ranks of `ppcl finetune`, and what is checked before they start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ppcl_ds import launch
from ppcl_ds.distill.checkpoint import Checkpoint, newest_checkpoint
from ppcl_ds.distill.run import check_data, check_students, nodes_of, say_epochs
from ppcl_ds.distill.start import check_resume
from ppcl_ds.distill.trained import unit_sources
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import ACCELERATORS
from ppcl_ds.estimate.show import show_tuning
from ppcl_ds.estimate.tuning import size_tuning
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles, empty_model
from ppcl_ds.families.reader import open_teacher
from ppcl_ds.families.sources import Sources
from ppcl_ds.finetune.origin import Origin
from ppcl_ds.finetune.parts import stage_bounds
from ppcl_ds.planning.plan import Plan, UnitPlan, load_plan
from ppcl_ds.planning.variant import Layout, layout
from ppcl_ds.recipe import Recipe, open_run
from ppcl_ds.sections import Finetune


@dataclass(frozen=True)
class Start:
    """Everything that fine-tuning starts from, in order.

    Attributes:
        library: the newest checkpoint of the units' own training.
        trained: the plan of that training.
    """

    recipe: Recipe
    settings: Finetune
    variant: str
    plan: Plan
    files: ModelFiles
    anatomy: Anatomy
    library: Checkpoint
    trained: Plan

    @property
    def origin(self) -> Origin:
        """Where the units were trained."""
        return Origin(checkpoint=self.library.folder, step=self.library.contents.step)

    def units(self, unit: UnitPlan) -> Sources:
        """A unit's tensors as its library left them."""
        return unit_sources(self.library, self.trained, unit)

    def layout(self, dtype: torch.dtype | None = None) -> Layout:
        """The variant as it starts."""
        return layout(self.files, self.anatomy, self.plan, self.variant, self.units, dtype)


def check(recipe: Recipe, variant: str, from_run: Path | None) -> Start:
    """Everything that can be wrong before a process starts.

    Args:
        from_run: the run folder whose library holds the units; None: the recipe's own.

    Raises:
        UserError: one line that says what.
    """
    settings = recipe.tuning
    files, anatomy = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, files, anatomy)
    chosen = plan.units_of(variant)
    if not chosen:
        raise UserError(
            f"variant '{variant}' plugs no unit: it is the teacher itself, and there is nothing to fine-tune"
        )
    launch.check_world(recipe.topology.world)
    check_data(recipe, heldout=bool(settings.sample_every))
    check_students(recipe, "finetune")
    source = (open_run(from_run) if from_run else recipe).distillation
    library = newest_checkpoint(source.checkpoints)
    trained = load_plan(source.plan, files, anatomy)
    start = Start(recipe, settings, variant, plan, files, anatomy, library, trained)
    config = start.layout().config  # complains of a unit that the library lacks
    keys = [block.key for block in Anatomy(empty_model(config)).blocks]
    stage_bounds(config, keys, [1.0] * len(keys), recipe.topology.stages)
    folder = recipe.finetuning(variant)
    if folder.begun:
        check_resume(recipe, folder, "finetune", chosen, load_plan(folder.plan, files, anatomy))
    return start


def finetune(start: Start, until: int | None = None) -> None:
    """Fine-tune to the last step, or only `until` an earlier one; every rank must call this."""
    launch.join(start.settings.timeout)
    from ppcl_ds.finetune.trainer import FineTuner

    FineTuner(start).train(until)
    launch.leave()


def rehearse(start: Start) -> None:
    """What can be said before a run that `check` has let pass: its estimate, and how often it reads its shards."""
    recipe, settings = start.recipe, start.settings
    nodes, gpus = nodes_of(recipe.topology.world)
    show_tuning(size_tuning(recipe, settings, start.variant, nodes, gpus, ACCELERATORS["h100"]))
    say_epochs(recipe, settings)
