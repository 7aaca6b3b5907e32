"""`ppcl plan`: from a probe report to a plan file, and what such a file holds."""

from __future__ import annotations

from rich.console import Console

from ppcl_ds.early import PlanMemory
from ppcl_ds.errors import UserError
from ppcl_ds.planning.budget import Budget, budget_of
from ppcl_ds.planning.choose import make_plan
from ppcl_ds.planning.error_model import Forecast, fitted, probed, unknown
from ppcl_ds.planning.show import Outlook, Point, front, lines_of, print_outlook, print_table, save_outlook
from ppcl_ds.planning.swaps import Swaps, load_swaps
from ppcl_ds.probing.report import load_report
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.teacher.teacher import Teacher, open_teacher
from ppcl_ds.units.plan import Plan, check_plan, load_plan, refuse_edited, replace_plan


def plan(recipe: Recipe) -> None:
    """Choose by what the probe found, write `plan.yaml`, print the variants."""
    refuse_edited(recipe.plan_file)
    teacher = open_teacher(recipe)
    as_given = recipe.plan.rule == "given" and not recipe.plan.variants and not recipe.plan.candidates
    report = None if as_given else load_report(recipe.probe_folder)
    if recipe.plan.budget == "latency":
        print("plan.budget: how long blocks take is measured by --from-run; until then parameters stand for it")
    dtype = DTYPES[recipe.teacher.precision]
    chosen = make_plan(recipe.plan, recipe.seed, report, teacher, budget_of(recipe.plan, teacher, dtype))
    write(recipe, chosen, teacher, _probed(recipe, teacher), budget_for(recipe, chosen, teacher))


def _probed(recipe: Recipe, teacher: Teacher) -> Forecast:
    """What the probe expects; it knows nothing where it has not run, as a plan that is given needs none."""
    if not (recipe.probe_folder / "report.json").exists():
        return unknown()
    return probed(load_report(recipe.probe_folder), teacher)


def budget_for(recipe: Recipe, plan: Plan, teacher: Teacher, swaps: Swaps | None = None) -> Budget:
    """The recipe's budget for the units of a plan."""
    dtype = DTYPES[recipe.teacher.precision]
    return budget_of(recipe.plan, teacher, dtype, plan.units, swaps)


def write(
    recipe: Recipe, plan: Plan, teacher: Teacher, forecast: Forecast, budget: Budget, swaps: Swaps | None = None
) -> None:
    """Write `plan.yaml`, keep an earlier one beside it, and print its variants.

    Args:
        swaps: what was measured.

    Raises:
        UserError: the earlier one has been edited.
    """
    earlier = replace_plan(recipe.plan_file, plan)
    PlanMemory(recipe).remember()
    lines = lines_of(plan, teacher, forecast, budget, swaps)
    print_table(lines, teacher.anatomy, forecast)
    outlook = Outlook(plan=plan, budget=budget.title, title=forecast.title, measures=forecast.titles, lines=lines)
    save_outlook(recipe.swaps_file.parent, outlook)
    print(f"wrote {recipe.plan_file}: {len(plan.units)} units for {len(plan.variants)} variants")
    if earlier:
        print(f"the earlier one is {earlier}")
    if swaps is not None:
        print_outlook(plan, forecast, swaps, recipe.plan.unit_steps, recipe.distill.steps)


def check(recipe: Recipe) -> None:
    """Say everything that is wrong with the plan file.

    Raises:
        UserError: something is.
    """
    memory = PlanMemory(recipe)
    _, problems = check_plan(recipe.plan_file, open_teacher(recipe, weights=False))
    console = Console(stderr=True, highlight=False)
    for problem in problems[:-1]:
        console.print(f"error: plan {recipe.plan_file}: {problem}", markup=False, soft_wrap=True)
    if problems:
        raise UserError(f"plan {recipe.plan_file}: {problems[-1]}")
    memory.remember()
    print(f"{recipe.plan_file} is in order")


def show(recipe: Recipe) -> None:
    """Print the variants of the plan file, and keep where they lie on the front of error over size.

    What is expected comes from the measured library where the plan's units are all in it, else from the probe.
    """
    teacher = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, teacher)
    swaps = load_swaps(recipe.swaps_file)
    if swaps is not None and set(plan.units) <= set(swaps.units):
        forecast = fitted(swaps, recipe.plan.objective)
    else:
        swaps, forecast = None, _probed(recipe, teacher)
    known = plan if swaps is None else plan.model_copy(update={"units": swaps.units})
    budget = budget_for(recipe, known, teacher, swaps)
    lines = lines_of(plan, teacher, forecast, budget, swaps)
    print_table(lines, teacher.anatomy, forecast)
    if swaps is not None:
        print_outlook(plan, forecast, swaps, recipe.plan.unit_steps, recipe.distill.steps)
    outlook = Outlook(
        plan=plan,
        budget=budget.title,
        title=forecast.title,
        measures=forecast.titles,
        lines=lines,
        points=front(forecast, budget),
        measured=_measured(swaps, budget) if swaps else [],
    )
    save_outlook(recipe.swaps_file.parent, outlook)


def _measured(swaps: Swaps, budget: Budget) -> list[Point]:
    units = {unit.name: unit for unit in swaps.units}
    return [
        Point(1 - budget.saved(units[name] for name in each.units) / budget.total, each.errors, " ".join(each.units))
        for each in swaps.sets
    ]
