"""Variants with width units leave the house whole: any plugs, any checkpoint, loaded where ppcl_ds is not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import ppcl_ds
from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.sample import sample
from ppcl_ds.export.consolidate import Form, consolidate, read_switches, replug
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.plan import conflict
from ppcl_ds.units.variant import assembled
from tests.conftest import TEACHERS, command, make_recipe
from tests.export.trained import pretend_trained, write_checkpoint
from tests.plans import every_kind

NewRun = Callable[..., Path]
FAMILIES = ["qwen", "flux", "sd3"]


def in_memory(recipe: Recipe, family: str, variant: str) -> Any:
    teacher = open_teacher(recipe)
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    return assembled(teacher, every_kind(family), variant, lambda unit: checkpoint.unit(unit.name))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_is_streamed_as_it_is_in_memory_from_any_number_of_ranks(new_run: NewRun, family: str) -> None:
    recipe = pretend_trained(new_run(family), family, ranks=4, plan=every_kind(family))
    consolidate(recipe, [], Form(max_shard_size=40_000))
    models = {variant: in_memory(recipe, family, variant) for variant in every_kind(family).variants}
    for variant, model in models.items():
        found = ppcl_ds.load_model(recipe.pruned(variant), torch.float32)
        torch.testing.assert_close(dict(found.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
        assert type(found) is type(model)
        card = (recipe.pruned(variant).parent / "README.md").read_text()
        assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
        assert "trust_remote_code=True" in card
    sample(recipe.pruned("mixed").parent, ["a tiny one"], recipe.run / "drawn.png", seed=0, steps=2, size=8)
    with Image.open(recipe.run / "drawn.png") as picture:
        assert picture.format == "PNG"
    for ranks in (1, 2):
        shutil.rmtree(recipe.distillation.checkpoints / "step-000007")
        write_checkpoint(recipe, every_kind(family), ranks, step=7)
        again = in_memory(recipe, family, "mixed")
        torch.testing.assert_close(dict(again.state_dict()), dict(models["mixed"].state_dict()), rtol=0, atol=0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_any_plugs_that_go_together_make_a_model_and_others_are_refused(
    run_of: Callable[[str], Recipe], data: st.DataObject, family: str
) -> None:
    recipe, plan = run_of(family), every_kind(family)
    chosen = data.draw(st.sets(st.sampled_from([unit.name for unit in plan.units])))
    words = [f"{unit.name}={'on' if unit.name in chosen else 'off'}" for unit in plan.units]
    units = [unit for unit in plan.units if unit.name in chosen]
    if any(conflict(a, b) for a in units for b in units if a is not b):
        with pytest.raises(UserError, match="--plug"):
            replug(plan, plan, "mixed", read_switches(words))
        return
    changed = replug(plan, plan, "mixed", read_switches(words))
    teacher = open_teacher(recipe)
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    model = assembled(teacher, changed, "mixed", lambda unit: checkpoint.unit(unit.name))
    state = model.state_dict()
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    for unit in units:  # every number that was trained is in the model, whatever it is called there
        for tensor in checkpoint.unit(unit.name).values():
            assert any(torch.equal(tensor, other) for other in state.values() if other.shape == tensor.shape)
    assert type(model).__name__.startswith("Pruned") == any(unit.kind != "depth" for unit in units)


@pytest.fixture(scope="module")
def run_of(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Recipe]:
    """Family -> a run that looks trained, with units of every kind; made on first use."""
    made: dict[str, Recipe] = {}

    def make(family: str) -> Recipe:
        if family not in made:
            run = tmp_path_factory.mktemp(family) / "run"
            shutil.copytree(prepared(family), run)
            (run / "recipe.yaml").write_text(yaml.safe_dump(make_recipe(family, run)))
            made[family] = pretend_trained(run / "recipe.yaml", family, plan=every_kind(family))
        return made[family]

    return make


IN_A_PIPELINE = """
import sys
try:
    import ppcl_ds
except ImportError:
    pass
else:
    sys.exit("ppcl_ds is installed here")
import diffusers, numpy, torch
trust = {"trust_remote_code": True} if sys.argv[3] else {}
pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32, **trust)
pipeline.set_progress_bar_config(disable=True)
noise = torch.Generator().manual_seed(5)
image = pipeline("a tiny three", num_inference_steps=2, height=8, width=8, generator=noise, output_type="np").images
numpy.save(sys.argv[2], image)
print(type(pipeline.transformer).__name__)
"""


@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_a_pipeline_with_width_units_draws_where_ppcl_ds_is_not_installed(
    new_run: NewRun, tmp_path: Path, without_us: Path, family: str
) -> None:
    path = new_run(family)
    pipeline = path.parent / "teacher"
    variants = {"deep": ("span",), "mixed": ("group", "line", "thin")}
    recipe = pretend_trained(path, family, plan=every_kind(family).model_copy(update={"variants": variants}))
    teachers_index = (pipeline / "model_index.json").read_bytes()
    consolidate(load_recipe(path), [], Form())
    assert (pipeline / "model_index.json").read_bytes() == teachers_index
    stock = family == "flux"  # whose pipeline is one of diffusers' own
    for variant, trust, beginning in (("deep", not stock, ""), ("mixed", True, "Pruned")):
        folder = recipe.pruned(variant).parent
        done = subprocess.run(
            [without_us, "-c", IN_A_PIPELINE, folder, tmp_path / f"{variant}.npy", "trusted" if trust else ""],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / f"modules of {variant}"), "PYTHONPATH": ""},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == beginning + TEACHERS[family][0]
        own = ppcl_ds.load_pipeline(folder, torch.float32)  # the code in the folder is not run, and not asked about
        own.set_progress_bar_config(disable=True)
        options: dict[str, Any] = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "np"}
        image = own("a tiny three", generator=torch.Generator().manual_seed(5), **options).images
        assert np.array_equal(np.load(tmp_path / f"{variant}.npy"), image)


def test_the_transformer_alone_loads_through_automodel(new_run: NewRun, tmp_path: Path, without_us: Path) -> None:
    recipe = pretend_trained(new_run("sd3"), "sd3", plan=every_kind("sd3"))
    consolidate(recipe, ["mixed"], Form(dtype="bf16"))
    program = (
        "import sys, diffusers, torch\n"
        "model = diffusers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, torch_dtype=torch.bfloat16)\n"
        "print(type(model).__name__, sum(p.numel() for p in model.parameters()))\n"
    )
    done = subprocess.run(
        [without_us, "-c", program, recipe.pruned("mixed")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    count = sum(p.numel() for p in in_memory(recipe, "sd3", "mixed").parameters())
    assert done.stdout.split() == ["PrunedSD3Transformer2DModel", str(count)]


def test_a_single_file_is_refused_where_comfyui_has_no_such_blocks(new_run: NewRun) -> None:
    path = new_run("qwen")
    pretend_trained(path, "qwen", plan=every_kind("qwen"))
    printed = command("consolidate", path, "--variant", "mixed", "--single-file", "comfyui", code=2)
    assert len(printed.strip().splitlines()) == 1
    assert "PrunedQwenImageTransformer2DModel" in printed
