"""The local loop: it gives the weights of DeepSpeed's schedule, and a unit whose loss is not finite harms no other.

Run as a module, this file is one of the two ranks.
"""

from __future__ import annotations

import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
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
from ppcl_ds.units.unit import UnitBatch
from tests.conftest import make_recipe
from tests.plans import three_spans
from tests.ranks import run_ranks

STEPS = 4
MICRO_BATCHES = 4
PLAN = three_spans()
BROKEN = ("middle", 2)
"""Unit and step (from 0) whose target is not a number in one of the micro-batches."""

Fed = Mapping[str, UnitBatch]
Weights = dict[str, dict[str, Tensor]]


def be_a_rank(path: Path) -> None:
    """Train the same library on the same micro-batches three times; write its weights after every step."""
    recipe = load_recipe(path)
    teacher, plan = check(recipe)
    launch.join()
    from ppcl_ds.distill.trainer import Trainer  # DeepSpeed is imported by ranks only

    trainer = Trainer(recipe, plan, teacher)
    fed, held = read_ahead(trainer)
    broken = list(fed)
    place = BROKEN[1] * MICRO_BATCHES + 1
    if BROKEN[0] in broken[place]:
        sick = broken[place][BROKEN[0]]
        targets = {stream: tensor * torch.nan for stream, tensor in sick.targets.items()}
        broken[place] = {**broken[place], BROKEN[0]: replace(sick, targets=targets)}
    found: dict[str, Any] = {"held": held}
    for name, training in {
        "loop": PlainLoop(trainer, fed),
        "1F1B": OneForwardOneBackward(trainer, fed),
        "broken": PlainLoop(trainer, broken),
    }.items():
        found[name] = training.weights(), trainer.engine.optimizer.skipped
        found[f"{name} keeps"] = training.kept
    torch.save(found, path.parent / f"rank{dist.get_rank()}.pt")
    launch.leave()
    launch.end()


def read_ahead(trainer: Any) -> tuple[list[Fed], list[int]]:
    """What arrives in all steps, copied; and at each teacher forward, how many tensors of the round before are there.

    Once for the copies, once without them, to see what stays.
    """
    fed: list[Fed] = [dict(arrived) for arrived in trainer.arrivals(trainer.batches(0), STEPS)]
    seen: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def note(*_: Any) -> None:
        held.append(sum(ref() is not None for ref in seen))

    handle = trainer.sharded.module.register_forward_pre_hook(note)
    for arrived in trainer.arrivals(trainer.batches(0), STEPS):
        seen += [weakref.ref(tensor) for unit in arrived.values() for tensor in unit.targets.values()]
    handle.remove()
    return fed, held


class PlainLoop:
    """The product's own step over what has been read ahead.

    Attributes:
        kept: when a unit's forward begins, the most outputs of units that are there with their activations.
    """

    def __init__(self, trainer: Any, fed: list[Fed]) -> None:
        self.trainer, self.fed, self.kept = trainer, fed, 0

    def weights(self) -> list[Weights]:
        """Train a new library; its weights after every step."""
        self.trainer.engine, _ = self.trainer.build()
        layers = self.trainer.library.layers
        outputs: list[weakref.ref[Tensor]] = []

        def before(*_: Any) -> None:
            self.kept = max(self.kept, sum(ref() is not None for ref in outputs))

        def after(unit: Any, read: Any, found: dict[str, Tensor]) -> None:
            outputs.extend(map(weakref.ref, found.values()))

        for layer in layers:
            layer.unit.register_forward_pre_hook(before)
            layer.unit.register_forward_hook(after)
        history = []
        for step in self.steps(iter(self.fed)):
            step()
            state = {layer.name: layer.unit.core.state_dict() for layer in layers}
            history.append({unit: {key: t.clone() for key, t in tensors.items()} for unit, tensors in state.items()})
        return history

    def steps(self, fed: Iterator[Fed]) -> list[Callable[[], None]]:
        """What takes each step."""
        self.trainer.arrivals = lambda batches: islice(fed, MICRO_BATCHES)
        return [partial(self.trainer.step, iter(()))] * STEPS


class OneForwardOneBackward(PlainLoop):
    """DeepSpeed's own schedule: a loss runs from stage to stage, and each adds those of its units."""

    def steps(self, fed: Iterator[Fed]) -> list[Callable[[], None]]:
        """What takes each step."""
        library = self.trainer.library

        def forward(running: Tensor) -> Tensor:
            arrived = next(fed)
            return running + torch.stack([layer.loss(arrived[layer.name]) for layer in library.layers]).sum()

        library.forward = forward
        nothing = torch.zeros(())
        return [partial(self.trainer.engine.train_batch, repeat((nothing, nothing)))] * STEPS


Found = dict[str, Any]
"""Of each training: weights after every step, and steps that each unit skipped; and what was in memory."""


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
    together: Found = {name: [stage[name] for stage in stages] for name in stages[0]}
    for name in ("loop", "1F1B", "broken"):
        histories = zip(*(stage[name][0] for stage in stages), strict=True)
        skipped = {unit: count for stage in stages for unit, count in stage[name][1].items()}
        together[name] = [first | second for first, second in histories], skipped
    return together


def test_the_plain_loop_gives_the_weights_of_1f1b_bit_for_bit(found: Found) -> None:
    for step, (local, stock) in enumerate(zip(found["loop"][0], found["1F1B"][0], strict=True)):
        assert local.keys() == {unit.name for unit in PLAN.units}
        torch.testing.assert_close(local, stock, rtol=0, atol=0, msg=f"step {step}")
    first, last = found["loop"][0][0], found["loop"][0][-1]
    assert all(not torch.equal(first[unit][key], last[unit][key]) for unit in last for key in ("attn.to_q.weight",))


def test_the_activations_of_one_unit_are_in_memory_and_the_tensors_of_one_round(found: Found) -> None:
    assert found["loop keeps"] == [0, 0]
    assert max(found["1F1B keeps"]) > 1, "there, units and micro-batches wait for their backward"
    assert found["held"] == [[0] * (STEPS * MICRO_BATCHES // 2)] * 2


def test_a_unit_that_is_not_finite_skips_its_own_step_and_harms_no_other(found: Found) -> None:
    (clean, nobody), (broken, skipped) = found["loop"], found["broken"]
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
