"""The ranks of `ppcl distill`, and what is checked before they start."""

from __future__ import annotations

from ppcl_ds import launch
from ppcl_ds.data.stream import split_shards
from ppcl_ds.errors import UserError
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.families.reader import open_teacher
from ppcl_ds.planning.plan import Plan, load_plan
from ppcl_ds.recipe import Recipe


def check(recipe: Recipe) -> tuple[ModelFiles, Anatomy, Plan]:
    """Everything that can be wrong before a process starts.

    Raises:
        UserError: one line that says what.
    """
    files, anatomy = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, files, anatomy)
    if recipe.topology.stages > len(plan.units):
        raise UserError(
            f"topology.stages is {recipe.topology.stages}, but the plan has only {len(plan.units)} units; "
            "use at most one stage a unit"
        )
    if (recipe.checkpoints / "latest").exists():
        trained = load_plan(recipe.trained_plan, files, anatomy)
        if trained.units != plan.units:
            raise UserError(
                f"{recipe.trained_plan.parent} was trained with other units than {recipe.plan_file} has; "
                "restore them, or move that folder away to train anew"
            )
    split_shards(recipe.data.shards, "train")
    return files, anatomy, plan


def distill(recipe: Recipe, files: ModelFiles, anatomy: Anatomy, plan: Plan) -> None:
    """Distill the plan's library; every rank must call this."""
    launch.join()
    from ppcl_ds.distill.trainer import Trainer

    Trainer(recipe, plan, files, anatomy).train()
    launch.leave()
