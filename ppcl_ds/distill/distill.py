"""The ranks of `ppcl distill`, and what is checked before they start."""

from __future__ import annotations

from ppcl_ds import launch
from ppcl_ds.data.index import split_entries
from ppcl_ds.data.stream import check_data
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import ACCELERATORS
from ppcl_ds.estimate.show import show
from ppcl_ds.estimate.sizing import size_run
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import Training
from ppcl_ds.teacher.teacher import Teacher, open_teacher
from ppcl_ds.training.checks import check_held, check_resume, check_students
from ppcl_ds.units.plan import Plan, load_plan

_NODE = 8
"""Accelerators of a node that a dry run assumes where they fill whole ones."""


def check(recipe: Recipe) -> tuple[Teacher, Plan]:
    """Everything that can be wrong before a process starts.

    Raises:
        UserError: one line that says what.
    """
    teacher = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, teacher)
    if recipe.topology.stages > len(plan.units):
        raise UserError(
            f"topology.stages is {recipe.topology.stages}, but the plan has only {len(plan.units)} units; "
            "use at most one stage a unit"
        )
    launch.check_world(recipe.topology.world)
    check_data(recipe.data, heldout=bool(recipe.distill.sample_every))
    folder = recipe.distillation
    check_students(recipe, folder)
    if folder.begun:
        check_resume(recipe, folder, plan.units, load_plan(folder.plan, teacher))
        check_held(recipe, folder, plan.units)
    return teacher, plan


def rehearse(recipe: Recipe) -> None:
    """What can be said before a run that `check` has let pass: its estimate, and how often it reads its shards."""
    nodes, gpus = nodes_of(recipe.topology.world)
    show(size_run(recipe, nodes, gpus, ACCELERATORS["h100"]))
    say_epochs(recipe, recipe.distill)


def nodes_of(world: int) -> tuple[int, int]:
    """Nodes, and accelerators of each, that so many processes are taken to run on."""
    nodes = 1 if world % _NODE else world // _NODE
    return nodes, world // nodes


def say_epochs(recipe: Recipe, training: Training) -> None:
    """The last lines of a dry run."""
    entries = split_entries(recipe.data, "train")
    samples = sum(entry.samples for entry in entries)
    epochs = training.steps * training.micro_batch * training.micro_batches_per_step / samples
    print(f"shards: {len(entries)} with {samples} samples, read {epochs:.3g} times in {training.steps} steps")
    print("recipe, plan, topology and shards are in order; `ppcl estimate` sizes it for other clusters")


def distill(recipe: Recipe, teacher: Teacher, plan: Plan, until: int | None = None) -> None:
    """Distill the plan's library, to its last step or only `until` an earlier one; every rank must call this."""
    launch.join(recipe.distill.timeout)
    from ppcl_ds.distill.trainer import Trainer

    Trainer(recipe, plan, teacher).train(until)
    launch.leave()
