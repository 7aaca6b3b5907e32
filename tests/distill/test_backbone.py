"""The backbone: distributed distillation computes what a plain single-process torch loop computes, on any topology."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from ppcl_ds.recipe import Recipe, checkpoint_tag, load_recipe
from ppcl_ds.teacher.noising import DTYPES, NoisyBatch, NoisyStream
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.teacher.trajectories import TrajectoryStream
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.watch.tensorboard import read_scalars
from tests.conftest import command, mix_shapes
from tests.reference import PlainAdamW, change_missed, distance

STEPS = 10
SETTINGS = {
    "steps": STEPS,
    "micro_batches_per_step": 4,
    "optimizer": {"lr": 1e-3, "warmup_steps": 1, "clip_norm": 0.02},  # so short that most gradients are clipped
    "checkpoint_every": 1,
    "keep_checkpoints": STEPS,
}
PLAN = Plan(
    teacher="QwenImageTransformer2DModel",
    blocks=6,
    units=(
        UnitPlan(name="early", span=(0, 2), streams=("image", "text")),
        UnitPlan(name="middle", span=(1, 3), streams=("image", "text")),
        UnitPlan(name="short", span=(2, 3), streams=("image", "text")),
        UnitPlan(name="late", span=(4, 5), streams=("image",)),
    ),
    variants={"small": ("early", "late"), "other": ("middle",)},
)
TOPOLOGIES = [(1, 1), (4, 1), (1, 2), (2, 2), (2, 1), (1, 4)]
"""Stages and replicas; a run goes on with the next pair where the one before was stopped."""


@dataclass
class Reference:
    """What one process that knows no DeepSpeed finds; lists by step."""

    losses: list[dict[str, float]] = field(default_factory=list)
    norms: list[dict[str, float]] = field(default_factory=list)
    masters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def reference(recipe: Recipe) -> Reference:
    """The plain loop; units and teacher are in the run's dtype."""
    found, dtype = Reference(), DTYPES[recipe.teacher.precision]
    teacher = diffusers.QwenImageTransformer2DModel.from_pretrained(
        recipe.teacher.path / "transformer", torch_dtype=dtype
    ).eval()
    units = {unit.name: copy.deepcopy(teacher.transformer_blocks[unit.span[0]]) for unit in PLAN.units}
    settings, count = recipe.distill.optimizer, recipe.distill.micro_batches_per_step
    optimizers = {name: PlainAdamW(unit.named_parameters(), settings, STEPS) for name, unit in units.items()}
    read: list[list[Any]] = []
    stream = readings(recipe, teacher)
    for step in range(STEPS):
        losses = dict.fromkeys(units, 0.0)
        if step % recipe.distill.replay.uses == 0:
            read.append(list(islice(stream, count)))
        for batch, calls, outputs in read[DRAWN[step] if recipe.distill.replay.uses > 1 else step]:
            for unit in PLAN.units:
                text, image = units[unit.name](**calls[unit.span[0]])
                true_text, true_image = outputs[unit.span[1]]
                loss = distance(image, true_image, None, weights := weigh(recipe, batch))
                if "text" in unit.streams:
                    loss = loss + distance(text, true_text, batch.arguments["encoder_hidden_states_mask"], weights)
                if recipe.distill.branch_weight:
                    loss = loss + recipe.distill.branch_weight * change_missed(image, true_image, batch.twins)
                (loss / count).backward()
                losses[unit.name] += loss.item() / count
                optimizers[unit.name].add_gradients()
        found.losses.append(losses)
        found.norms.append({name: optimizer.step() for name, optimizer in optimizers.items()})
    for name, optimizer in optimizers.items():
        found.masters[name] = optimizer.masters
        found.moments[name] = {what: flat(optimizer.moment(what)) for what in ("exp_avg", "exp_avg_sq")}
    return found


def weigh(recipe: Recipe, batch: NoisyBatch) -> Tensor | None:
    """The samples' weights by their places on the ladder."""
    if not (levels := sorted(recipe.distill.level_weights.items())):
        return None
    known, weights = (np.array(each) for each in zip(*levels, strict=True))
    return torch.tensor(np.interp(batch.places.numpy(), known, weights), dtype=torch.float32)


def readings(recipe: Recipe, teacher: Any) -> Iterator[tuple[NoisyBatch, Any, Any]]:
    """Micro-batches, and what `watch` sees of each; trajectories are taken further."""
    call, distill = open_teacher(recipe).call, recipe.distill
    if distill.trajectories is None:
        paired = distill.branch_weight > 0
        for _, batch in NoisyStream(recipe, call, "train", distill.micro_batch, paired=paired).take(0, 1):
            yield batch, *watch(teacher, batch)[:2]
        return
    lanes = distill.micro_batches_per_step
    stream = TrajectoryStream(recipe, call, "train", distill.micro_batch, lanes, distill.trajectories)
    for number, batch in stream.take(0, 1):
        calls, outputs, velocity = watch(teacher, batch)
        if batch.number is not None:  # else it is of images, `data.real_share`
            assert batch.number == number
            stream.advance(number, velocity, None if batch.other is None else teacher(**batch.other)[0])
        yield batch, calls, outputs


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def watch(teacher: Any, batch: Any) -> tuple[list[dict[str, Any]], list[tuple[Tensor, Tensor]], Tensor]:
    """What every block was called with, what it returned, and the velocity."""
    calls: list[dict[str, Any]] = []
    outputs: list[tuple[Tensor, Tensor]] = []
    handles = []
    for block in teacher.transformer_blocks:
        handles.append(block.register_forward_pre_hook(lambda m, a, kw: calls.append(dict(kw)), with_kwargs=True))
        handles.append(block.register_forward_hook(lambda m, a, out: outputs.append(out)))
    with torch.no_grad():
        velocity = teacher(**batch.arguments)[0]
    for handle in handles:
        handle.remove()
    return calls, outputs, velocity


REPLAY = {"uses": 2, "ring": 3}
DRAWN = [0, 0, 0, 1, 1, 1, 1, 2, 4, 3]
"""The reading that each step is taken on under `REPLAY` and the recipe's seed: one of the newest three."""


def distill_from(path: Path, step: int, stages: int, replicas: int) -> Recipe:
    """Run `ppcl distill` to the end on a topology, going on after `step`."""
    raw = yaml.safe_load(path.read_text())
    raw["topology"] = {"stages": stages, "replicas": replicas}
    # As two nodes of two ranks, or every rank with all of it.
    raw["teacher"]["ranks_per_copy"] = {(2, 2): 2, (1, 4): 2, (4, 1): 1, (2, 1): 1}.get((stages, replicas))
    path.write_text(yaml.safe_dump(raw))
    recipe = load_recipe(path)
    if step:
        (recipe.distillation.checkpoints / "latest").write_text(checkpoint_tag(step))
    command("distill", path)
    return recipe


def expect_curves(recipe: Recipe, found: Reference, since: int, relative: float, absolute: float) -> None:
    """Losses and gradient norms of every unit and step are the reference's."""
    scalars = read_scalars(recipe.distillation.board)
    steps = list(range(1, STEPS + 1))
    totals = [sum(losses.values()) for losses in found.losses]
    assert [step for step, _ in scalars["run/loss"]] == steps
    assert [value for _, value in scalars["run/loss"]] == pytest.approx(totals, rel=relative, abs=absolute)
    for unit in PLAN.units:
        curves = [points for name, points in scalars.items() if name.startswith(f"{unit.name}/loss/")]
        assert len(curves) >= len(unit.streams)
        sums = [sum(value for _, value in points) for points in zip(*curves, strict=True)]
        expected = [losses[unit.name] for losses in found.losses]
        assert sums[since:] == pytest.approx(expected[since:], rel=relative, abs=absolute)
        lengths = [norm for _, norm in scalars[f"{unit.name}/gradient_norm"]]
        assert lengths[since:] == pytest.approx([n[unit.name] for n in found.norms[since:]], rel=relative, abs=absolute)


def test_a_run_that_changes_its_topology_five_times_equals_a_plain_loop(new_run: Callable[..., Path]) -> None:
    """Every topology of up to four ranks takes the run to its end; the next one goes on in the middle, a step later.

    Micro-batches have two latent shapes, so ranks and rounds differ in what they carry.
    """
    path = new_run("qwen", distill=SETTINGS)
    mix_shapes(path)
    PLAN.save(load_recipe(path).plan_file)
    found = reference(load_recipe(path))
    assert sum(norm > 0.02 for norms in found.norms for norm in norms.values()) > STEPS
    for step, (stages, replicas) in enumerate(TOPOLOGIES):
        recipe = distill_from(path, step, stages, replicas)
        expect_curves(recipe, found, step, relative=0, absolute=1e-5)
        checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
        assert checkpoint.contents.step == STEPS
        assert len({p.file for unit in checkpoint.contents.units.values() for p in unit.pieces}) == stages * replicas
        for unit in PLAN.units:
            torch.testing.assert_close(checkpoint.unit(unit.name), found.masters[unit.name], rtol=0, atol=1e-5)
            for what, expected in found.moments[unit.name].items():
                moment = checkpoint.part(unit.name, what, 0, len(expected))
                torch.testing.assert_close(moment, expected, rtol=0, atol=1e-5)


TRAJECTORIES = {"steps": [2, 4], "guidance": [1.5, 3.0]}
LEVELS = {0.2: 3.0, 0.6: 0.5, 0.9: 1.0}


@pytest.mark.parametrize(
    ("more", "real_share"),
    [
        ({"replay": REPLAY}, 0.0),
        ({"trajectories": TRAJECTORIES}, 0.0),
        ({"replay": REPLAY, "trajectories": TRAJECTORIES, "level_weights": LEVELS}, 0.4),
        ({"level_weights": LEVELS, "branch_weight": 0.5}, 0.0),
    ],
    ids=["replay", "trajectories", "both", "weights"],
)
def test_with_replay_on_trajectories_and_weighted_too(
    more: dict[str, Any], real_share: float, new_run: Callable[..., Path]
) -> None:
    """A restart goes on with pictures as they were, and fills the ring again; the next topology draws the same."""
    path = new_run("qwen", distill=SETTINGS | more, data={"real_share": real_share})
    mix_shapes(path)
    PLAN.save(load_recipe(path).plan_file)
    found = reference(load_recipe(path))
    for step, (stages, replicas) in enumerate([(1, 1), (2, 1), (1, 2), (2, 2)]):
        recipe = distill_from(path, 2 * step, stages, replicas)
        expect_curves(recipe, found, 2 * step, relative=0, absolute=1e-5)
        checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
        for unit in PLAN.units:
            torch.testing.assert_close(checkpoint.unit(unit.name), found.masters[unit.name], rtol=0, atol=1e-5)


def test_in_bf16_it_equals_a_plain_loop_within_rounding(new_run: Callable[..., Path]) -> None:
    path = new_run("qwen", distill=SETTINGS, teacher={"precision": "bf16"})
    mix_shapes(path)
    PLAN.save(load_recipe(path).plan_file)
    found = reference(load_recipe(path))
    rounding = 2**-8
    for step, (stages, replicas) in enumerate([(1, 1), (2, 2)]):
        recipe = distill_from(path, step, stages, replicas)
        expect_curves(recipe, found, step, relative=rounding, absolute=0)
        checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
        for unit in PLAN.units:
            masters, expected = flat(checkpoint.unit(unit.name)), flat(found.masters[unit.name])
            assert masters.dtype == torch.float32
            assert float((masters - expected).norm() / expected.norm()) < rounding
            for what, moment in found.moments[unit.name].items():
                own = checkpoint.part(unit.name, what, 0, len(moment))
                assert float((own - moment).norm() / moment.norm()) < rounding
