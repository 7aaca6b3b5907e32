"""Runs that look trained: a plan, and a checkpoint of random units that several ranks have written."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ppcl_ds.atomic import atomic_write
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.teacher.anatomy import block_shapes
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import Contents, Piece, SavedUnit
from ppcl_ds.units.kinds import build_unit
from ppcl_ds.units.plan import Plan
from tests.plans import image_spans


def pretend_trained(path: Path, family: str, ranks: int = 3, plan: Plan | None = None) -> Recipe:
    """Give a new run its plan and a checkpoint in the middle of training, each unit in pieces on all ranks."""
    recipe = load_recipe(path)
    plan = plan or image_spans(family)
    plan.save(recipe.plan_file)
    plan.save(recipe.distillation.plan)
    atomic_write(recipe.distillation.recipe, recipe.model_dump_json())
    write_checkpoint(recipe, plan, ranks)
    return recipe


def write_checkpoint(recipe: Recipe, plan: Plan, ranks: int, step: int = 7) -> None:
    """Random units, their flat vectors cut into as many parts as there are ranks."""
    teacher = open_teacher(recipe)
    generator = torch.Generator().manual_seed(step)
    saved: dict[str, SavedUnit] = {}
    held: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for unit in plan.units:
        shapes = block_shapes(build_unit(unit, teacher, torch.float32).core)
        flat = torch.randn(sum(shape.numel() for shape in shapes.values()), generator=generator) / 10
        pieces, start = [], 0
        for rank, part in enumerate(flat.chunk(ranks)):
            held[rank][f"{unit.name}/master"] = part.clone()
            pieces.append(Piece(file=f"rank-{rank:05d}.safetensors", start=start, stop=start + len(part)))
            start += len(part)
        parameters = {name: list(shape) for name, shape in shapes.items()}
        saved[unit.name] = SavedUnit(parameters=parameters, pieces=pieces, skipped=0)
    folder = recipe.distillation.checkpoints / f"step-{step:06d}"
    folder.mkdir(parents=True)
    for rank, tensors in enumerate(held):
        save_file(tensors, folder / f"rank-{rank:05d}.safetensors")
    (folder / "checkpoint.json").write_text(Contents(step=step, units=saved).model_dump_json())
    (recipe.distillation.checkpoints / "latest").write_text(folder.name)
