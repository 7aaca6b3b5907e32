"""The students' engine: its schedule changes no weight, and a unit whose loss is not finite harms no other.

Run as a module, this file is one of the two ranks.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from ppcl_ds import launch
from ppcl_ds.distill.distill import check
from ppcl_ds.recipe import load_recipe
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.units.unit import Parcel
from tests.conftest import make_recipe
from tests.ranks import run_ranks

STEPS = 4
MICRO_BATCHES = 4
PLAN = Plan(
    teacher="QwenImageTransformer2DModel",
    blocks=6,
    units=(
        UnitPlan(name="early", span=(0, 2), streams=("image", "text")),
        UnitPlan(name="middle", span=(1, 3), streams=("image", "text")),
        UnitPlan(name="late", span=(4, 5), streams=("image",)),
    ),
    variants={"small": ("early", "late")},
)
BROKEN = ("middle", 2)
"""Unit and step (from 0) whose target is not a number in one of the micro-batches."""

Weights = dict[str, dict[str, Tensor]]


def be_a_rank(path: Path) -> None:
    """Train the same library on the same parcels three times; write its weights after every step."""
    recipe = load_recipe(path)
    teacher, plan = check(recipe)
    launch.join()
    # DeepSpeed is imported by ranks only.
    from benchmarks.schedule import OneForwardOneBackward, WithoutBubbles, new_engine
    from ppcl_ds.distill.trainer import Trainer

    trainer = Trainer(recipe, plan, teacher)
    rounds = trainer.rounds(0)
    parcels: list[Mapping[str, Parcel]] = []
    for _ in range(STEPS * MICRO_BATCHES):
        next(rounds)
        parcels.append(rounds.inbox.parcels)
    broken = list(parcels)
    place = BROKEN[1] * MICRO_BATCHES + 1
    if BROKEN[0] in broken[place]:
        sick = broken[place][BROKEN[0]]
        targets = {stream: tensor * torch.nan for stream, tensor in sick.targets.items()}
        broken[place] = {**broken[place], BROKEN[0]: replace(sick, targets=targets)}

    def train(kind: type[Any], fed: list[Mapping[str, Parcel]]) -> tuple[list[Weights], dict]:
        engine = new_engine(kind, recipe, fed)
        history: list[Weights] = []
        for _ in range(STEPS):
            engine.train_batch()
            state = {layer.plan.name: layer.unit.core.state_dict() for layer in engine.module.layers}
            history.append({unit: {key: t.clone() for key, t in tensors.items()} for unit, tensors in state.items()})
        return history, engine.optimizer.skipped

    found = {
        "local": train(WithoutBubbles, parcels),
        "1F1B": train(OneForwardOneBackward, parcels),
        "broken": train(WithoutBubbles, broken),
    }
    torch.save(found, path.parent / f"rank{dist.get_rank()}.pt")
    launch.leave()
    launch.end()


Found = dict[str, tuple[list[Weights], dict[str, int]]]


@pytest.fixture(scope="module")
def found(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What both stages found, put together."""
    run = tmp_path_factory.mktemp("engine") / "run"
    shutil.copytree(prepared("qwen"), run)
    recipe = make_recipe("qwen", run)
    recipe["distill"] |= {"micro_batches_per_step": MICRO_BATCHES, "steps": STEPS}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    PLAN.save(load_recipe(run / "recipe.yaml").plan_file)
    run_ranks("tests.training.test_engine", run / "recipe.yaml")
    stages: list[Found] = [torch.load(run / f"rank{rank}.pt") for rank in range(2)]
    together: Found = {}
    for name in stages[0]:
        histories = zip(*(stage[name][0] for stage in stages), strict=True)
        skipped = {unit: count for stage in stages for unit, count in stage[name][1].items()}
        together[name] = [first | second for first, second in histories], skipped
    return together


def test_the_schedule_without_bubbles_gives_the_weights_of_1f1b_bit_for_bit(found: Found) -> None:
    for step, (local, stock) in enumerate(zip(found["local"][0], found["1F1B"][0], strict=True)):
        assert local.keys() == {unit.name for unit in PLAN.units}
        torch.testing.assert_close(local, stock, rtol=0, atol=0, msg=f"step {step}")
    first, last = found["local"][0][0], found["local"][0][-1]
    assert all(not torch.equal(first[unit][key], last[unit][key]) for unit in last for key in ("attn.to_q.weight",))


def test_a_unit_that_is_not_finite_skips_its_own_step_and_harms_no_other(found: Found) -> None:
    (clean, nobody), (broken, skipped) = found["local"], found["broken"]
    unit, step = BROKEN
    assert nobody == dict.fromkeys(nobody, 0)
    assert skipped == nobody | {unit: 1}
    for number, (mine, other) in enumerate(zip(broken, clean, strict=True)):
        for name in mine.keys() - {unit} if number >= step else mine.keys():
            torch.testing.assert_close(mine[name], other[name], rtol=0, atol=0)
    torch.testing.assert_close(broken[step][unit], broken[step - 1][unit], rtol=0, atol=0)
    assert all(tensor.isfinite().all() for tensor in broken[-1][unit].values())
    assert not torch.equal(broken[-1][unit]["attn.to_q.weight"], broken[step][unit]["attn.to_q.weight"])


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
