"""`ppcl plan`: from a probe report to a plan file."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.reader import open_teacher
from ppcl_ds.planning.choose import make_plan
from ppcl_ds.planning.plan import Plan
from ppcl_ds.probing.report import load_report
from ppcl_ds.recipe import Recipe


def plan(recipe: Recipe) -> None:
    """Choose, write `plan.yaml`, print the variants."""
    files, anatomy = open_teacher(recipe)
    chosen = make_plan(recipe.plan, load_report(recipe.probe_folder), files, anatomy)
    chosen.save(recipe.plan_file)
    _show(chosen, anatomy)
    print(f"wrote {recipe.plan_file}: {len(chosen.units)} units for {len(chosen.variants)} variants")


def _show(plan: Plan, anatomy: Anatomy) -> None:
    table = Table("variant", "blocks", "block parameters", "spans")
    for variant in plan.variants:
        kept = sum(anatomy.blocks[origin].parameters for origin, _ in plan.places(variant))
        spans = " ".join(f"[{unit.span[0]},{unit.span[1]}]" for unit in plan.units_of(variant))
        change = kept / anatomy.block_parameters - 1
        blocks = f"{len(plan.places(variant))} of {plan.blocks}"
        table.add_row(variant, blocks, f"{kept:,} ({change:+.0%})", spans.replace("[", r"\["))
    Console().print(table)
