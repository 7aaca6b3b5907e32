"""What a training is checked for before it starts: its DeepSpeed files, and what it was started with before."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from ppcl_ds import launch
from ppcl_ds.atomic import atomic_write, require_space
from ppcl_ds.data.index import digest, split_entries
from ppcl_ds.data.stream import FIXED
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe, TrainingFolder, read_deepspeed_file, teacher_config, written_recipe
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.watch.lock import check_lock
from ppcl_ds.watch.mirror import check_package

_SHARDS = "shards.sha256"
"""Beside the recipe that training began with: the digest of its shards."""

_FIXED_BY_COMMAND = {
    "distill": (
        "micro_batch",
        "micro_batches_per_step",
        "start",
        "start_from",
        "level_weights",
        "branch_weight",
        "trajectories",
        "replay.uses",
        "replay.ring",
    ),
    "finetune": (
        "micro_batch",
        "micro_batches_per_step",
        "flow_weight",
        "velocity_weight",
        "boundary_weight",
        "trainable",
        "kept_lr",
        "ema",
        "trajectories",
    ),
}
_FIXED_OF_OPTIMIZER = ("lr", "betas", "weight_decay", "warmup_steps", "clip_norm")
"""Recipe keys that a run keeps from its first step to its last."""


def check_students(recipe: Recipe, folder: TrainingFolder) -> None:
    """That the DeepSpeed files can be read, and leave alone what the recipe says and we do part by part; and that a
    package that the recipe asks for is there.

    Args:
        folder: of the training.

    Raises:
        UserError: one line that names the file and the key.
    """
    check_package(recipe)
    teacher_config(recipe)
    students = read_deepspeed_file(recipe.deepspeed.students)
    for key, place, own in (
        ("gradient_clipping", students, "clip_norm"),
        ("offload_optimizer", students.get("zero_optimization", {}), "offload"),
    ):
        if place.get(key):
            raise UserError(
                f"DeepSpeed file {recipe.deepspeed.students}: {key} must not be set; "
                f"recipe key {folder.command}.optimizer.{own} says it"
            )


def checkpoint_bytes(parameters: int, average: bool) -> int:
    """How large a checkpoint is: of each trained parameter the master, AdamW's two moments and its moving average, if
    one is kept, all float32."""
    return parameters * 4 * (4 if average else 3)


def check_folder(folder: TrainingFolder, parameters: int, keep: int, average: bool = False) -> None:
    """That a training's folder can be written into, by nobody else, and has room for its checkpoints.

    Args:
        parameters: that are trained.
        keep: checkpoints that stay; one more is there while the newest is written.
        average: whether their moving average is kept.

    Raises:
        UserError: it is not so.
    """
    there = sum(1 for _ in folder.checkpoints.glob("step-*[0-9]"))
    require_space(folder.checkpoints, checkpoint_bytes(parameters, average) * max(1, keep + 1 - there))
    if not launch.is_rank():  # the first rank holds the lock of its own start
        check_lock(folder.path)


def write_start(recipe: Recipe, folder: TrainingFolder, plan: Plan) -> None:
    """Write down plan, shards and recipe; one rank alone."""
    plan.save(folder.plan)
    atomic_write(folder.path / _SHARDS, digest(split_entries(recipe.data, "train")))
    atomic_write(folder.recipe, recipe.model_dump_json(indent=1))


def check_resume(
    recipe: Recipe,
    folder: TrainingFolder,
    units: Sequence[UnitPlan],
    trained: Plan,
) -> None:
    """A checkpoint goes on only as the run that wrote it: same samples and optimizer, and units that it knows.

    Units may have been dropped from the plan meanwhile: no unit knows of another, so the rest go on as if nothing were.

    Args:
        folder: of the training.
        units: as they are now.
        trained: the plan as it was when training began.

    Raises:
        UserError: something else than the topology has changed; the message names it.
    """
    anew = f"restore it, or move {folder.path} away to train anew"
    if strange := [unit.name for unit in units if unit not in trained.units]:
        raise UserError(
            f"{folder.path} was trained with other units than {recipe.plan_file} has, such as '{strange[0]}'; {anew}"
        )
    try:
        before = written_recipe(folder.recipe.read_bytes())
        shards = (folder.path / _SHARDS).read_text()
    except (OSError, ValueError) as fault:
        name = getattr(fault, "filename", None) or folder.recipe
        raise UserError(f"{name} is missing or damaged; {anew}") from None
    command = folder.command
    optimizer = [f"{command}.optimizer.{key}" for key in _FIXED_OF_OPTIMIZER]
    for key in (
        *FIXED,
        "distill.magnitude_weight",
        *(f"{command}.{key}" for key in _FIXED_BY_COMMAND[command]),
        *optimizer,
    ):
        old, new = (attrgetter(key)(version) for version in (before, recipe))
        if old != new:
            raise UserError(f"recipe key '{key}' is not what {folder.path} was trained with ({old}); {anew}")
    if shards != digest(split_entries(recipe.data, "train")):
        raise UserError(f"{folder.path} was trained on other shards than those in {recipe.data.shards}; {anew}")
    tag = (folder.checkpoints / "latest").read_text().strip()
    if not (folder.checkpoints / tag).is_dir():
        raise UserError(
            f"{folder.checkpoints}/latest names '{tag}', which is gone; write the name of one that is there"
        )


def check_held(recipe: Recipe, folder: TrainingFolder, units: Sequence[UnitPlan]) -> None:
    """Refuse a newest checkpoint that lacks a unit.

    Raises:
        UserError: the message names the unit.
    """
    held = newest_checkpoint(folder.checkpoints).contents.units
    if lacking := [unit.name for unit in units if unit.name not in held]:
        raise UserError(
            f"{folder.path} was trained with other units than {recipe.plan_file} has: its newest checkpoint lacks "
            f"'{lacking[0]}'; restore it, or move {folder.path} away to train anew"
        )
