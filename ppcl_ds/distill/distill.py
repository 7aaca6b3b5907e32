"""The ranks of `ppcl distill`, and what is checked before they start."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ppcl_ds import launch
from ppcl_ds.data.stream import check_data
from ppcl_ds.distill.start import open_earlier
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.teacher import Teacher, open_teacher
from ppcl_ds.training.checks import check_folder, check_held, check_resume, check_students
from ppcl_ds.units.kinds import empty_unit
from ppcl_ds.units.plan import Plan, load_plan
from ppcl_ds.units.unit import count_parameters


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
    images = recipe.distill.trajectories is None or recipe.data.real_share > 0
    check_data(recipe.data, heldout=bool(recipe.distill.sample_every), section="distill", images=images)
    folder = recipe.distillation
    check_students(recipe, folder)
    parameters = sum(count_parameters(empty_unit(unit, teacher, torch.float32)) for unit in plan.units)
    check_folder(folder, parameters, recipe.distill.keep_checkpoints)
    if folder.begun:
        check_resume(recipe, folder, plan.units, load_plan(folder.plan, teacher))
        check_held(recipe, folder, plan.units)
    else:
        open_earlier(recipe, teacher, plan)
    return teacher, plan


def distill(
    recipe: Recipe,
    teacher: Teacher,
    plan: Plan,
    until: int | None = None,
    joined: Callable[[], object] = lambda: None,
) -> None:
    """Distill the plan's library, to its last step or only `until` an earlier one; every rank must call this.

    Args:
        joined: called once the ranks have joined each other, before anything is loaded.
    """
    launch.join(recipe.distill.timeout, deterministic=recipe.deterministic)
    joined()
    from ppcl_ds.distill.trainer import Trainer

    trainer = Trainer(recipe, plan, teacher)
    trainer.train(until)
    launch.leave(trainer.preemption.exit_code)
