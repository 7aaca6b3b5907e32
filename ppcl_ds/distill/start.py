"""What a run was started with: written before its first step, compared at every restart."""

from __future__ import annotations

from operator import attrgetter

from pydantic import ValidationError

from ppcl_ds.data.index import digest, split_entries
from ppcl_ds.distill.checkpoint import newest_checkpoint
from ppcl_ds.errors import UserError
from ppcl_ds.planning.plan import Plan
from ppcl_ds.recipe import Recipe
from ppcl_ds.whole import write_whole

_SHARDS = "shards.sha256"
"""Beside the recipe that training began with: the digest of its shards."""

_FIXED = (
    "seed",
    "noise",
    "data.captions",
    "data.images",
    "data.window",
    "teacher.precision",
    "distill.micro_batch",
    "distill.micro_batches_per_step",
    "distill.magnitude_weight",
    "distill.optimizer.lr",
    "distill.optimizer.betas",
    "distill.optimizer.weight_decay",
    "distill.optimizer.warmup_steps",
    "distill.optimizer.clip_norm",
)
"""Recipe keys that a run keeps from its first step to its last."""


def write_start(recipe: Recipe, plan: Plan) -> None:
    """Write down plan, shards and recipe; one rank alone."""
    plan.save(recipe.trained_plan)
    write_whole(recipe.trained_recipe.with_name(_SHARDS), digest(split_entries(recipe.data, "train")))
    write_whole(recipe.trained_recipe, recipe.model_dump_json(indent=1))


def check_resume(recipe: Recipe, plan: Plan, trained: Plan) -> None:
    """A checkpoint goes on only as the run that wrote it: same samples and optimizer, and units that it holds.

    Units may have been dropped from the plan meanwhile: no unit knows of another, so the rest go on as if nothing were.

    Args:
        plan: as it is now.
        trained: as it was when training began.

    Raises:
        UserError: something else than the topology has changed; the message names it.
    """
    folder = recipe.trained_plan.parent
    anew = f"restore it, or move {folder} away to train anew"
    others = f"{folder} was trained with other units than {recipe.plan_file} has"
    if strange := [unit.name for unit in plan.units if unit not in trained.units]:
        raise UserError(f"{others}, such as '{strange[0]}'; {anew}")
    try:
        before = Recipe.model_validate_json(recipe.trained_recipe.read_text())
        shards = recipe.trained_recipe.with_name(_SHARDS).read_text()
    except (OSError, ValidationError) as fault:
        name = getattr(fault, "filename", None) or recipe.trained_recipe
        raise UserError(f"{name} is missing or damaged; {anew}") from None
    for key in _FIXED:
        old, new = (attrgetter(key)(version) for version in (before, recipe))
        if old != new:
            raise UserError(f"recipe key '{key}' is not what {folder} was trained with ({old}); {anew}")
    if shards != digest(split_entries(recipe.data, "train")):
        raise UserError(f"{folder} was trained on other shards than those in {recipe.data.shards}; {anew}")
    tag = (recipe.checkpoints / "latest").read_text().strip()
    if not (recipe.checkpoints / tag).is_dir():
        raise UserError(
            f"{recipe.checkpoints}/latest names '{tag}', which is gone; write the name of one that is there"
        )
    held = newest_checkpoint(recipe.checkpoints).contents.units
    for unit in plan.units:
        if unit.name not in held:
            raise UserError(f"{others}: its newest checkpoint lacks '{unit.name}'; {anew}")
