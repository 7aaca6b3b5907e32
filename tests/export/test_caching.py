"""cache-dit on pruned pipelines: it finds the blocks that are left, and skips them where it may; `--speed` times it."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml

from ppcl_ds.evaluate import speed
from ppcl_ds.evaluate.evaluate import check
from ppcl_ds.export.consolidate import Form, consolidate
from ppcl_ds.export.load import load_pipeline
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.variant import assembled
from tests.export.trained import pretend_trained
from tests.families.test_call import made
from tests.plans import image_spans

pytestmark = pytest.mark.tools

STEPS = 12


def flux(new_run: Callable[..., Path], folder: Path) -> tuple[Any, dict[str, Any]]:
    """A variant's folder, as it was written."""
    recipe = pretend_trained(new_run("flux"), "flux")
    consolidate(recipe, ["small"], Form())
    call = {"prompt": "a tiny two", "height": 8, "width": 8} | dict(recipe.teacher.options)
    return load_pipeline(recipe.pruned("small").parent, torch.float32), call


def qwen(new_run: Callable[..., Path], folder: Path) -> tuple[Any, dict[str, Any]]:
    """Qwen-Image's stock pipeline with a variant of its transformer, and guidance, so two forwards a step."""
    family, pipeline = made("qwen_image")
    pipeline.save_pretrained(folder)
    pipeline.transformer = assembled(Teacher(folder), image_spans("qwen"), "small", None)
    return pipeline, dict(family.call) | {"true_cfg_scale": 2.0, "negative_prompt": " "}


@pytest.mark.parametrize("make", [qwen, flux])
def test_a_variant_draws_under_cache_dit(make: Any, new_run: Callable[..., Path], tmp_path: Path) -> None:
    cache_dit: Any = import_module("cache_dit")
    pipeline, call = make(new_run, tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    calls = 0

    def count(module: object, arguments: object) -> None:
        nonlocal calls
        calls += 1

    pipeline.transformer.transformer_blocks[-1].register_forward_pre_hook(count)

    def draw() -> tuple[np.ndarray, int]:
        before = calls
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline(**call, num_inference_steps=STEPS, generator=generator, output_type="np").images[0]
        return drawn, calls - before

    plain, whole = draw()
    assert whole == STEPS * (1 + (make is qwen))
    for threshold in (0.0, 10.0):  # the relative change of a residual below which blocks are skipped
        config = cache_dit.DBCacheConfig(residual_diff_threshold=threshold, Fn_compute_blocks=1, max_warmup_steps=2)
        cache_dit.enable_cache(pipeline, cache_config=config)
        drawn, called = draw()
        cache_dit.disable_cache(pipeline)
        assert np.isfinite(drawn).all()
        assert (called < whole) == bool(threshold)
        assert np.allclose(drawn, plain, atol=1e-5) != bool(threshold)
    again, called = draw()
    assert called == whole
    assert np.array_equal(again, plain)


def test_speed_under_cache_dit_leaves_the_next_pipeline_alone(
    new_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = new_run("flux")
    recipe = yaml.safe_load(path.read_text())
    recipe["evaluate"] = {"steps": 4}
    path.write_text(yaml.safe_dump(recipe))
    consolidate(pretend_trained(path, "flux"), ["small", "medium"], Form())
    checked = check(load_recipe(path))
    monkeypatch.setattr(speed, "BATCHES", (1, 2))
    stock = diffusers.FluxPipeline.__call__
    rows = speed.measure_speed(checked.recipe, checked.teacher, ["teacher", "small"], ["cached", "plain"])
    faults = {(row.model, row.way): row.fault for row in rows}
    refused = faults.pop(("small", "cached"))
    assert re.search("Fn_compute_blocks 8 must be less than the number of transformer blocks 6", refused)
    assert faults == {("teacher", "plain"): "", ("teacher", "cached"): "", ("small", "plain"): ""}
    assert all(row.seconds for row in rows if not row.fault)
    assert diffusers.FluxPipeline.__call__ is stock  # what cache-dit puts there would hold on to the model before
