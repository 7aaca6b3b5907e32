"""The ranks of `ppcl finetune`, and what is checked before they start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ppcl_ds import launch
from ppcl_ds.distill.checkpoint import newest_checkpoint
from ppcl_ds.distill.run import check_data, check_students
from ppcl_ds.distill.start import check_resume
from ppcl_ds.distill.trained import unit_sources
from ppcl_ds.errors import UserError
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles, empty_model
from ppcl_ds.families.reader import open_teacher
from ppcl_ds.families.sources import Sources
from ppcl_ds.finetune.parts import stage_bounds
from ppcl_ds.planning.plan import Plan, UnitPlan, load_plan
from ppcl_ds.planning.variant import Layout, layout
from ppcl_ds.recipe import Recipe, open_run
from ppcl_ds.sections import Finetune


@dataclass(frozen=True)
class Checked:
    """Everything that fine-tuning starts from, in order.

    Attributes:
        units: gives a unit's tensors as its library left them.
    """

    recipe: Recipe
    settings: Finetune
    variant: str
    plan: Plan
    files: ModelFiles
    anatomy: Anatomy
    units: Callable[[UnitPlan], Sources]

    @property
    def layout(self) -> Layout:
        """The variant as it starts."""
        return layout(self.files, self.anatomy, self.plan, self.variant, self.units)


def check(recipe: Recipe, variant: str, library: Path | None) -> Checked:
    """Everything that can be wrong before a process starts.

    Args:
        library: the run folder whose library holds the units; None: the recipe's own.

    Raises:
        UserError: one line that says what.
    """
    if recipe.finetune is None:
        raise UserError(
            "the recipe has no section 'finetune'; it says at least steps, micro_batch, micro_batches_per_step"
        )
    files, anatomy = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, files, anatomy)
    chosen = plan.units_of(variant)
    if not chosen:
        raise UserError(
            f"variant '{variant}' plugs no unit: it is the teacher itself, and there is nothing to fine-tune"
        )
    launch.check_world(recipe.topology.world)
    check_data(recipe, heldout=bool(recipe.finetune.sample_every))
    check_students(recipe, "finetune")
    source = (open_run(library) if library else recipe).distillation
    checkpoint = newest_checkpoint(source.checkpoints)
    trained = load_plan(source.plan, files, anatomy)
    checked = Checked(
        recipe, recipe.finetune, variant, plan, files, anatomy, partial(unit_sources, checkpoint, trained)
    )
    start = checked.layout  # names a unit that the library lacks
    keys = [block.key for block in Anatomy(empty_model(start.config)).blocks]
    stage_bounds(start.config, keys, [1.0] * len(keys), recipe.topology.stages)
    folder = recipe.finetuning(variant)
    if folder.begun:
        check_resume(recipe, folder, "finetune", chosen, load_plan(folder.plan, files, anatomy))
    return checked


def finetune(checked: Checked, until: int | None = None) -> None:
    """Fine-tune to the last step, or only `until` an earlier one; every rank must call this."""
    launch.join(checked.settings.timeout)
    from ppcl_ds.finetune.trainer import FineTuner

    FineTuner(
        checked.recipe,
        checked.settings,
        checked.variant,
        checked.plan,
        checked.files,
        checked.anatomy,
        checked.units,
    ).train(until)
    launch.leave()


def rehearse(checked: Checked) -> None:
    """What can be said before a run that `check` has let pass."""
    print("todo")
