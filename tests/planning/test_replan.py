"""Planning from a run: units cost what stock models with them cost, and the run goes on with those that are left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from ppcl_ds.planning.swaps import Swaps, load_swaps
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.teacher.branches import Branches
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import Checkpoint, newest_checkpoint
from ppcl_ds.units.plan import Plan, UnitPlan, load_plan
from ppcl_ds.units.variant import assembled
from tests.calls import answer
from tests.conftest import command

SPANS = [(0, 1), (0, 2), (2, 3), (3, 5), (4, 5)]
DEPTH = [
    UnitPlan(name=f"unit_{u}_{v}", span=(u, v), streams=("image",) if v == 5 else ("image", "text")) for u, v in SPANS
]
UNITS = (
    *DEPTH,
    UnitPlan(name="text_2_4", kind="text", span=(2, 4), streams=("text",)),
    UnitPlan(name="ffn_1", kind="ffn", span=(1, 1), streams=("image", "text"), keep=0.5),
)
LIBRARY = Plan(teacher="QwenImageTransformer2DModel", blocks=6, units=UNITS, variants={"half": ("unit_0_2",)})


def stock_velocities(recipe: Recipe, names: tuple[str, ...], checkpoint: Checkpoint) -> Tensor:
    """Velocities of the teacher's stock class with units in place, on the micro-batches that planning measures on.

    The recipe samples without guidance, so every caption is read, and by one forward.
    """
    teacher = open_teacher(recipe)
    plan = LIBRARY.model_copy(update={"variants": {"set": names}})
    model = assembled(teacher, plan, "set", lambda unit: checkpoint.unit(unit.name))
    settings = recipe.evaluate
    branches = Branches(recipe, teacher.call, settings.batch_size)
    numbers = range(settings.velocity_batches, 2 * settings.velocity_batches)
    batches = [branches.noisy(number, branches.stream.clean.batch(number)).batch for number in numbers]
    return torch.cat([answer(model, batch.arguments).flatten() for batch in batches]).double()


def check_figures(recipe: Recipe, swaps: Swaps, checkpoint: Checkpoint) -> None:
    teacher = stock_velocities(recipe, (), checkpoint)
    added = torch.stack([stock_velocities(recipe, (unit.name,), checkpoint) - teacher for unit in UNITS])
    products = torch.tensor(swaps.products["velocity"], dtype=torch.float64)
    torch.testing.assert_close(products, added @ added.T / teacher.numel(), rtol=1e-4, atol=1e-9)
    assert len(swaps.sets) >= 4
    for each in swaps.sets:
        error = (stock_velocities(recipe, each.units, checkpoint) - teacher).square().mean()
        assert each.errors["velocity"] == pytest.approx(float(error), rel=1e-4)
    assert len(swaps.seconds) == 6
    assert min(swaps.seconds) > 0
    assert swaps.saved.keys() == {"text_2_4", "ffn_1"}


def test_a_run_is_planned_anew_and_goes_on_with_fewer_units(new_run: Callable[..., Path]) -> None:
    distill = {"steps": 6, "optimizer": {"lr": 1e-2, "warmup_steps": 1}}
    whole, path = (new_run("qwen", distill=distill, evaluate={"velocity_batches": 3}) for _ in range(2))
    for each in (whole, path):
        LIBRARY.save(load_recipe(each).plan_file)
    command("distill", whole)
    recipe = load_recipe(path)
    command("distill", path, "--until", "2")
    halfway = newest_checkpoint(recipe.distillation.checkpoints)
    assert halfway.contents.step == 2

    printed = command("plan", path, "--from-run", recipe.run)
    assert "medium" in printed
    swaps = load_swaps(recipe.swaps_file)
    assert swaps is not None
    check_figures(recipe, swaps, halfway)
    plan = load_plan(recipe.plan_file, open_teacher(recipe))
    assert set(plan.variants) == {*recipe.plan.variants, "half"}
    assert plan.variants["half"] == ("unit_0_2",), "written by hand"
    assert {name for names in plan.variants.values() for name in names} == {unit.name for unit in plan.units}
    assert len(plan.units) < len(UNITS)

    measured = recipe.swaps_file.stat().st_mtime_ns
    LIBRARY.save(recipe.plan_file)
    command("plan", path, "--from-run", recipe.run)  # nothing has been trained meanwhile: nothing is measured anew
    assert recipe.swaps_file.stat().st_mtime_ns == measured
    assert load_plan(recipe.plan_file, open_teacher(recipe)) == plan

    command("distill", path)
    ended, throughout = (
        newest_checkpoint(recipe.distillation.checkpoints),
        newest_checkpoint(load_recipe(whole).distillation.checkpoints),
    )
    assert ended.contents.step == 6
    assert set(ended.contents.units) == {unit.name for unit in plan.units}
    for unit in plan.units:
        torch.testing.assert_close(ended.unit(unit.name), throughout.unit(unit.name), rtol=0, atol=0)

    LIBRARY.save(recipe.plan_file)
    dropped = next(unit.name for unit in UNITS if unit not in plan.units)
    assert f"lacks '{dropped}'" in command("distill", path, code=2)


def test_a_run_that_was_not_trained_is_refused(new_run: Callable[..., Path]) -> None:
    path = new_run("qwen")
    run = yaml.safe_load(path.read_text())["run"]
    printed = command("plan", path, "--from-run", run, code=2)
    assert "run `ppcl distill` first" in printed
    assert len(printed.strip().splitlines()) == 1
    assert "one of them" in command("plan", path, "--from-run", run, "--check", code=2)
