"""`ppcl plan`: from a probe report to a plan file, and what such a file holds."""

from __future__ import annotations

from rich.console import Console

from ppcl_ds.errors import UserError
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.families.reader import DTYPES, open_teacher
from ppcl_ds.planning.choose import Sizes, block_sizes, make_plan
from ppcl_ds.planning.forecast import Forecast, fitted, probed
from ppcl_ds.planning.plan import Plan, check_plan, load_plan
from ppcl_ds.planning.show import Point, draw, front, lines_of, print_table
from ppcl_ds.planning.swaps import Swaps, load_swaps
from ppcl_ds.probing.report import load_report
from ppcl_ds.recipe import Recipe


def plan(recipe: Recipe) -> None:
    """Choose by what the probe found, write `plan.yaml`, print the variants."""
    files, anatomy = open_teacher(recipe)
    report = load_report(recipe.probe_folder)
    if recipe.plan.budget == "latency":
        print("plan.budget: how long blocks take is measured by --from-run; until then parameters stand for it")
    sizes = sizes_of(recipe, files, anatomy, None)
    chosen = make_plan(recipe.plan, recipe.seed, report, files, anatomy, sizes)
    write(recipe, chosen, anatomy, probed(report, files, anatomy), sizes)


def sizes_of(recipe: Recipe, files: ModelFiles, anatomy: Anatomy, swaps: Swaps | None) -> Sizes:
    """What each block weighs in the recipe's budget, (M,)."""
    seconds = swaps.seconds if swaps else None
    return block_sizes(recipe.plan, files, anatomy, DTYPES[recipe.teacher.precision], seconds)


def write(recipe: Recipe, plan: Plan, anatomy: Anatomy, forecast: Forecast, sizes: Sizes) -> None:
    """Write `plan.yaml` and print its variants."""
    plan.save(recipe.plan_file)
    print_table(lines_of(plan, anatomy, forecast, sizes), anatomy, forecast)
    print(f"wrote {recipe.plan_file}: {len(plan.units)} units for {len(plan.variants)} variants")


def check(recipe: Recipe) -> None:
    """Say everything that is wrong with the plan file.

    Raises:
        UserError: something is.
    """
    _, complaints = check_plan(recipe.plan_file, *open_teacher(recipe))
    console = Console(stderr=True, highlight=False)
    for complaint in complaints[:-1]:
        console.print(f"error: plan {recipe.plan_file}: {complaint}", markup=False, soft_wrap=True)
    if complaints:
        raise UserError(f"plan {recipe.plan_file}: {complaints[-1]}")
    print(f"{recipe.plan_file} is in order")


def show(recipe: Recipe) -> None:
    """Print the variants of the plan file, draw them on the front of error over size.

    What is expected comes from the measured library where the plan's units are all in it, else from the probe.
    """
    files, anatomy = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, files, anatomy)
    swaps = load_swaps(recipe.swaps_file)
    if swaps is not None and set(plan.units) <= set(swaps.units):
        forecast = fitted(swaps)
    else:
        swaps, forecast = None, probed(load_report(recipe.probe_folder), files, anatomy)
    sizes = sizes_of(recipe, files, anatomy, swaps)
    lines = lines_of(plan, anatomy, forecast, sizes)
    print_table(lines, anatomy, forecast)
    folder = recipe.swaps_file.parent
    measured = _measured(swaps, forecast, sizes) if swaps else []
    draw(folder, lines, front(forecast, sizes), measured, forecast, recipe.plan.budget, plan.teacher)
    print(f"wrote pareto.png and report.html into {folder}")


def _measured(swaps: Swaps, forecast: Forecast, sizes: Sizes) -> list[Point]:
    saved = dict(zip((unit.name for unit in swaps.units), forecast.candidates(sizes).saved, strict=True))
    return [
        Point(1 - sum(saved[name] for name in each.units) / float(sizes.sum()), each.error, " ".join(each.units))
        for each in swaps.sets
    ]
