"""Units do not know of each other: what else a library holds changes nothing about a unit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ppcl_ds.recipe import load_recipe
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.plan import Plan
from tests.conftest import command
from tests.plans import ten_spans

PLAN = ten_spans()
SHARED = PLAN.unit("unit_2_4")
"""Two of the variants plug it."""


def trained(path: Path, plan: Plan) -> dict[str, dict[str, Tensor]]:
    recipe = load_recipe(path)
    plan.save(recipe.plan_file)
    command("distill", path)
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    assert list(checkpoint.contents.units) == [unit.name for unit in plan.units]
    return {unit.name: checkpoint.unit(unit.name) for unit in plan.units}


def test_a_unit_alone_and_in_a_library_of_ten_end_with_identical_weights(new_run: Callable[..., Path]) -> None:
    """The library lies over two stages; alone, the unit is on one, recomputes activations and offloads its masters."""
    optimizer = {"lr": 1e-3, "warmup_steps": 1, "clip_norm": 0.02}
    together = trained(new_run("qwen", distill={"steps": 6, "optimizer": optimizer}), PLAN)
    otherwise = {"steps": 6, "activation_checkpointing": True, "optimizer": optimizer | {"offload": True}}
    topology = {"stages": 1, "replicas": 1}
    only = PLAN.model_copy(update={"units": (SHARED,), "variants": {"b": (SHARED.name,)}})
    alone = trained(new_run("qwen", distill=otherwise, topology=topology), only)
    torch.testing.assert_close(together[SHARED.name], alone[SHARED.name], rtol=0, atol=0)
    assert len({float(state["attn.to_q.bias"].abs().sum()) for state in together.values()}) == len(
        PLAN.units
    )  # all trained
