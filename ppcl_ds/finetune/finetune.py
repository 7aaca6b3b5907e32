"""The ranks of `ppcl finetune`, and what is checked before they start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from ppcl_ds import launch
from ppcl_ds.data.stream import check_data
from ppcl_ds.errors import UserError
from ppcl_ds.finetune.start import Library, Start, read_origin
from ppcl_ds.finetune.trainable import joined, parts_of
from ppcl_ds.recipe import Recipe, TrainingFolder, open_run
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.files import empty_model
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.training.checks import check_folder, check_resume, check_students
from ppcl_ds.training.stages import stage_bounds
from ppcl_ds.units.plan import load_plan


def check(recipe: Recipe, variant: str, from_run: Path | None) -> Start:
    """Everything that can be wrong before a process starts.

    Args:
        from_run: the run folder whose library holds the units; None: the recipe's own. What has begun goes on from its
            own checkpoint, and needs neither.

    Raises:
        UserError: one line that says what.
    """
    settings = recipe.tuning
    teacher = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, teacher)
    chosen = plan.units_of(variant)
    if not chosen:
        raise UserError(
            f"variant '{variant}' plugs no unit: it is the teacher itself, and there is nothing to fine-tune"
        )
    launch.check_world(recipe.topology.world)
    images = settings.trajectories is None or recipe.data.real_share > 0
    check_data(recipe.data, heldout=bool(settings.sample_every), section="finetune", images=images)
    folder = recipe.finetuning(variant)
    check_students(recipe, folder)
    library = None
    if folder.begun:
        before = load_plan(folder.plan, teacher)
        check_resume(recipe, folder, chosen, before)
        if before.units_of(variant) != chosen:
            raise UserError(
                f"{folder.path} was trained with other units than '{variant}' in {recipe.plan_file} has now; restore "
                f"the plan, or move {folder.path} away to fine-tune anew"
            )
    else:
        source = (open_run(from_run) if from_run else recipe).distillation
        library = Library(newest_checkpoint(source.checkpoints), load_plan(source.plan, teacher))
    start = Start(recipe, settings, variant, plan, teacher, library)
    whole = start.layout()  # names a unit that the library lacks
    empty = empty_model(whole.config)
    anatomy = Anatomy(empty, teacher.flows)
    stage_bounds(
        joined(whole.config, [block.key for block in anatomy.blocks]),
        [1.0] * len(anatomy.blocks),
        recipe.topology.stages,
    )
    parts = parts_of(anatomy, empty, whole.tensors, settings.trainable)
    trained = {name for part in parts for name in part.parameters}
    parameters = sum(p.numel() for name, p in empty.named_parameters() if name in trained)
    check_folder(folder, parameters, settings.keep_checkpoints, bool(settings.ema))
    return start


def newer_units(folder: TrainingFolder) -> str:
    """Words about what the units of a fine-tuning have learnt since it began, without it; empty: nothing."""
    if not folder.begun:
        return ""
    origin = read_origin(folder)
    library = origin.checkpoint.parent
    if not (library / "latest").exists() or (now := newest_checkpoint(library).contents.step) <= origin.step:
        return ""
    return (
        f"note: {folder.path} goes on from units of step {origin.step}; {library} has them of step {now}; "
        f"to fine-tune those, move {folder.path} away\n"
    )


def finetune(start: Start, until: int | None = None, joined: Callable[[], object] = lambda: None) -> None:
    """Fine-tune to the last step, or only `until` an earlier one; every rank must call this.

    Args:
        joined: called once the ranks have joined each other, before anything is loaded.
    """
    launch.join(start.settings.timeout, deterministic=start.recipe.deterministic)
    joined()
    from ppcl_ds.finetune.trainer import FineTuner

    if dist.get_rank() == 0:
        print(newer_units(start.folder), end="", flush=True)
    trainer = FineTuner(start)
    trainer.train(until)
    launch.leave(trainer.preemption.exit_code)
