"""`ppcl consolidate`: every variant of a run as a folder of its own."""

from __future__ import annotations

from functools import partial

from ppcl_ds.console import track
from ppcl_ds.distill.checkpoint import newest_checkpoint
from ppcl_ds.export.consolidate import consolidate as write_variant
from ppcl_ds.export.consolidate import unit_state
from ppcl_ds.families.reader import open_teacher
from ppcl_ds.planning.plan import load_plan
from ppcl_ds.recipe import Recipe


def consolidate(recipe: Recipe, variants: list[str]) -> None:
    """Write the named variants, or all."""
    files, anatomy = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, files, anatomy)
    names = variants or list(plan.variants)
    for name in names:
        plan.units_of(name)  # an unknown name is refused before anything is written
    trained = partial(unit_state, newest_checkpoint(recipe.checkpoints), load_plan(recipe.trained_plan, files, anatomy))
    for name in track(names, "consolidate", len(names)):
        write_variant(files, anatomy, plan, name, trained, recipe.pruned(name))
