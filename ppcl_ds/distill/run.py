"""The ranks of `ppcl distill`, and what is checked before they start."""

from __future__ import annotations

from operator import attrgetter

from pydantic import ValidationError

from ppcl_ds import launch
from ppcl_ds.data.stream import empty_prompt, split_shards
from ppcl_ds.errors import UserError
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.families.reader import open_teacher
from ppcl_ds.planning.plan import Plan, load_plan
from ppcl_ds.recipe import Recipe, read_deepspeed_file

_FIXED = (
    "seed",
    "topology",
    "noise",
    "data.captions",
    "data.images",
    "teacher.precision",
    "distill.micro_batch",
    "distill.micro_batches_per_step",
    "distill.magnitude_weight",
    "distill.optimizer",
)
"""Recipe keys that a run keeps from its first step to its last."""


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
    launch.check_world(recipe.topology.world)
    for split in ("train", "heldout") if recipe.distill.sample_every else ("train",):
        split_shards(recipe.data.shards, split)
    empty_prompt(recipe.data.shards, recipe.data.captions.masked)
    read_deepspeed_file(recipe.deepspeed.teacher)
    if read_deepspeed_file(recipe.deepspeed.students).get("gradient_clipping"):
        raise UserError(
            f"DeepSpeed file {recipe.deepspeed.students}: gradient_clipping must be 0; its norm is over all units, "
            "so one of them would change the others"
        )
    if (recipe.checkpoints / "latest").exists():
        _check_resume(recipe, plan, load_plan(recipe.trained_plan, files, anatomy))
    return files, anatomy, plan


def _check_resume(recipe: Recipe, plan: Plan, trained: Plan) -> None:
    """A checkpoint goes on only as the run that wrote it: same units, samples, topology and optimizer."""
    folder = recipe.trained_plan.parent
    anew = f"restore it, or move {folder} away to train anew"
    if trained.units != plan.units:
        raise UserError(f"{folder} was trained with other units than {recipe.plan_file} has; {anew}")
    try:
        before = Recipe.model_validate_json(recipe.trained_recipe.read_text())
    except (OSError, ValidationError):
        raise UserError(f"{recipe.trained_recipe} is missing or damaged; {anew}") from None
    for key in _FIXED:
        old, new = (attrgetter(key)(version) for version in (before, recipe))
        if old != new:
            raise UserError(f"recipe key '{key}' is not what {folder} was trained with ({old}); {anew}")
    tag = (recipe.checkpoints / "latest").read_text().strip()
    if not (recipe.checkpoints / tag).is_dir():
        raise UserError(
            f"{recipe.checkpoints}/latest names '{tag}', which is gone; write the name of one that is there"
        )


def distill(recipe: Recipe, files: ModelFiles, anatomy: Anatomy, plan: Plan) -> None:
    """Distill the plan's library; every rank must call this."""
    launch.join()
    from ppcl_ds.distill.trainer import Trainer

    Trainer(recipe, plan, files, anatomy).train()
    launch.leave()
