"""`deterministic: true` has ranks compute in the way that repeats to the same bits, and changes nothing on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from ppcl_ds.recipe import load_recipe
from ppcl_ds.training.checkpoint import newest_checkpoint
from tests.plans import three_spans
from tests.ranks import run


def test_every_rank_computes_deterministically_to_the_weights_of_a_cpu(
    new_run: Callable[..., Path], tmp_path: Path
) -> None:
    weights, notes = [], []
    for key in (False, True):
        path = new_run("qwen", distill={"steps": 2, "activation_checkpointing": True})
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"deterministic": key}))
        recipe = load_recipe(path)
        three_spans().save(recipe.plan_file)
        folder = tmp_path / f"noted {key}"
        folder.mkdir()
        done = run("tests.training.determined", "distill", path, env={"NOTED": str(folder)})
        assert done.returncode == 0, done.stdout + done.stderr
        notes.append([json.loads((folder / rank).read_text()) for rank in "01"])
        checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
        weights.append({unit.name: checkpoint.unit(unit.name) for unit in three_spans().units})
    free = {"deterministic": False, "warns only": False, "cudnn attention": True, "cublas": None}
    bound = {"deterministic": True, "warns only": False, "cudnn attention": False, "cublas": ":4096:8"}
    assert notes == [[free, free], [bound, bound]]
    for unit, tensors in weights[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, weights[1][unit][name])
