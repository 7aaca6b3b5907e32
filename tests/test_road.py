"""The whole road by the public commands, for families that differ in their blocks; nothing is written per family."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.plan import load_plan
from tests.conftest import TEACHERS
from tests.ranks import afresh, run

LOAD_WITHOUT_US = """
import sys
sys.modules["ppcl_ds"] = None  # as if it were not installed
import diffusers, torch
model = getattr(diffusers, sys.argv[2]).from_pretrained(sys.argv[1])
print(sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.parametrize(
    ("family", "precision"),
    [pytest.param("qwen", "fp32", marks=pytest.mark.launcher), ("flux", "fp32"), ("sd3", "bf16")],
)
def test_a_family_goes_from_shards_to_stock_models(new_run: Callable[..., Path], family: str, precision: str) -> None:
    path = new_run(family, teacher={"precision": precision})
    for step in ("probe", "plan", "distill", "consolidate", "evaluate"):
        done = (afresh if family == "qwen" else run)("ppcl_ds.cli", step, path)
        assert done.returncode == 0, done.stdout + done.stderr

    recipe = load_recipe(path)
    teacher = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, teacher)
    class_name = TEACHERS[family][0]
    stock = getattr(diffusers, class_name).from_pretrained(recipe.teacher.path / "transformer")
    whole = sum(block.parameters for block in teacher.blocks)
    models = {row["name"]: row for row in json.loads((recipe.run / "report.json").read_text())["models"]}
    assert set(models) == {"teacher", *plan.variants, *(f"{variant}-undistilled" for variant in plan.variants)}

    for variant, share in recipe.plan.variants.items():
        model = getattr(diffusers, class_name).from_pretrained(recipe.pruned(variant))
        left = sum(teacher.blocks[origin].parameters for origin, _ in plan.places(variant))
        assert abs(left / whole - (1 - share)) < 0.6 * max(b.parameters for b in teacher.blocks) / whole
        assert models[variant]["params"] == sum(p.numel() for p in model.parameters())
        expect_parts(model, stock, path, variant)
        printed = subprocess.run(
            [sys.executable, "-c", LOAD_WITHOUT_US, str(recipe.pruned(variant)), class_name],
            capture_output=True,
            text=True,
            check=True,
            cwd=path.parent,
        ).stdout
        assert int(printed) == models[variant]["params"]


def expect_parts(model: torch.nn.Module, stock: torch.nn.Module, path: Path, variant: str) -> None:
    """Units come from the checkpoint, every other block and everything around the blocks from the teacher."""
    recipe = load_recipe(path)
    teacher = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, teacher)
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    places = plan.places(variant)
    lists = list(dict.fromkeys(block.list_name for block in teacher.blocks))
    modules = [module for name in lists for module in getattr(model, name)]
    assert len(modules) == len(places)
    for module, (origin, unit) in zip(modules, places, strict=True):
        source = teacher.anatomy.module(stock, teacher.blocks[origin]).state_dict()
        expected = checkpoint.unit(unit.name) if unit else source
        expected = {key: tensor.float() for key, tensor in expected.items()}  # as the teacher is stored
        torch.testing.assert_close(dict(module.state_dict()), dict(expected), rtol=0, atol=0)
        if unit:
            assert any(not torch.equal(expected[key], source[key]) for key in source)
    around = {k: v for k, v in stock.state_dict().items() if not k.startswith(tuple(lists))}
    torch.testing.assert_close({k: model.state_dict()[k] for k in around}, around, rtol=0, atol=0)
