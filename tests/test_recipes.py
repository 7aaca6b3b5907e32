"""The recipes for published teachers pass the checks of a dry run on the teachers' real sizes, and fit as they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ppcl_ds.estimate.accelerators import ACCELERATORS
from ppcl_ds.estimate.assumed import assume_plan
from ppcl_ds.estimate.estimate import size
from ppcl_ds.estimate.inputs import read_inputs
from ppcl_ds.launch import check_world
from ppcl_ds.recipe import load_recipe
from ppcl_ds.shipped import shipped
from ppcl_ds.training.checks import check_students
from ppcl_ds.units.plan import load_plan
from tests.published import PUBLISHED, write_pipeline

GPUS = 8
PARAMETERS = {
    "qwen_image": 20.43,
    "qwen_image_edit": 20.43,
    "flux_1_dev": 11.90,
    "flux_2_dev": 32.22,
    "z_image": 6.15,
    "sd_3_5_large": 8.06,
    "wan_2_2": 14.29,
}
"""Thousand millions, as the sizes of the published weight files in bfloat16 say: half their bytes."""


def cases() -> list[object]:
    """Qwen-Image-Edit's pipeline imports torchvision."""
    needs = {"qwen_image_edit": pytest.mark.families}
    return [pytest.param(name, marks=needs.get(name, ())) for name in sorted(PUBLISHED)]


@pytest.mark.parametrize("name", cases())
def test_a_recipe_is_right_for_its_teacher(name: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(shipped(f"recipes/{name}.yaml").read_text())
    raw["run"], raw["teacher"]["path"] = str(tmp_path / "run"), str(tmp_path / "teacher")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    write_pipeline(name, tmp_path / "teacher")
    recipe = load_recipe(path)
    assert recipe.topology.world == GPUS
    for training in (recipe.distill, recipe.tuning):
        assert training.micro_batch * training.micro_batches_per_step == 64

    inputs = read_inputs(recipe, 1, GPUS)
    check_world(recipe.topology.world)
    check_students(recipe, recipe.distillation)
    assume_plan(recipe.plan.variants, inputs.teacher).save(recipe.plan_file)
    plan = load_plan(recipe.plan_file, inputs.teacher)
    assert recipe.topology.stages <= len(plan.units)
    found = size(inputs, ACCELERATORS["h100"])
    assert found.teacher_parameters / 1e9 == pytest.approx(PARAMETERS[name], rel=0.005)
    assert found.fits, found.memory
    tuned = size(read_inputs(recipe, 1, GPUS, "small", teacher=inputs.teacher), ACCELERATORS["h100"])
    assert tuned.fits, tuned.memory
    call, drawing = inputs.teacher.call, recipe.evaluate
    assert not (call.embeds_guidance and drawing.guidance > 1)
    assert call.guided(drawing.guidance) or drawing.guidance == 1
