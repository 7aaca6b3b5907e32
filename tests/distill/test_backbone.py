"""The backbone: distributed distillation computes what a plain single-process torch loop computes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppcl_ds.export.consolidate import newest_checkpoint, unit_state
from ppcl_ds.families.reader import NoisyStream
from ppcl_ds.planning.plan import Plan, UnitPlan
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.watch.board import read_scalars
from tests.conftest import command

STEPS = 5
PLAN = Plan(
    teacher="QwenImageTransformer2DModel",
    blocks=6,
    units=(
        UnitPlan(name="early", span=(0, 2), streams=("image", "text")),
        UnitPlan(name="middle", span=(1, 3), streams=("image", "text")),
        UnitPlan(name="late", span=(4, 5), streams=("image",)),
    ),
    variants={"small": ("early", "late"), "other": ("middle",)},
)


def reference(recipe: Recipe) -> tuple[list[float], dict[str, list[float]], dict[str, dict[str, Tensor]]]:
    """Losses by step, losses by unit and step, and final weights, by one process that knows no DeepSpeed."""
    teacher = diffusers.QwenImageTransformer2DModel.from_pretrained(recipe.teacher.path).eval()
    units = {unit.name: copy.deepcopy(teacher.transformer_blocks[unit.span[0]]) for unit in PLAN.units}
    optimizer = torch.optim.AdamW(
        [p for unit in units.values() for p in unit.parameters()],
        lr=recipe.distill.optimizer.lr,
        betas=recipe.distill.optimizer.betas,
        weight_decay=recipe.distill.optimizer.weight_decay,
    )
    stream = NoisyStream(recipe, "train", recipe.distill.micro_batch, torch.device("cpu")).take(0, 1)
    totals: list[float] = []
    by_unit: dict[str, list[float]] = {name: [] for name in units}
    count = recipe.distill.micro_batches_per_step
    for step in range(STEPS):
        rate = 1.0 if step >= 1 else 0.0  # one step of warm-up, then half a cosine
        progress = (step - 1) / (STEPS - 1)
        optimizer.param_groups[0]["lr"] = (
            recipe.distill.optimizer.lr * rate * 0.5 * (1 + math.cos(math.pi * max(progress, 0)))
        )
        sums = dict.fromkeys(units, 0.0)
        for _, batch in islice(stream, count):
            calls, outputs = watch(teacher, batch)
            for unit in PLAN.units:
                text, image = units[unit.name](**calls[unit.span[0]])
                true_text, true_image = outputs[unit.span[1]]
                loss = distance(image, true_image, None)
                if "text" in unit.streams:
                    loss = loss + distance(text, true_text, batch.prompts.mask)
                (loss / count).backward()
                sums[unit.name] += loss.item() / count
        optimizer.step()
        optimizer.zero_grad()
        totals.append(sum(sums.values()))
        for name, value in sums.items():
            by_unit[name].append(value)
    return totals, by_unit, {name: unit.state_dict() for name, unit in units.items()}


def watch(teacher: Any, batch: Any) -> tuple[list[dict[str, Any]], list[tuple[Tensor, Tensor]]]:
    """What every block was called with, and what it returned."""
    calls: list[dict[str, Any]] = []
    outputs: list[tuple[Tensor, Tensor]] = []
    handles = []
    for block in teacher.transformer_blocks:
        handles.append(block.register_forward_pre_hook(lambda m, a, kw: calls.append(dict(kw)), with_kwargs=True))
        handles.append(block.register_forward_hook(lambda m, a, out: outputs.append(out)))
    latents = batch.latents.reshape(-1, 1, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 4)
    with torch.no_grad():
        teacher(
            hidden_states=latents,
            encoder_hidden_states=batch.prompts.embeds,
            encoder_hidden_states_mask=batch.prompts.mask,
            timestep=batch.sigmas,
            img_shapes=[[(1, 4, 4)]] * len(latents),
        )
    for handle in handles:
        handle.remove()
    return calls, outputs


def distance(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    angle = 2 - 2 * F.cosine_similarity(student, teacher, dim=-1)
    size = (student.norm(dim=-1) / teacher.norm(dim=-1)).log() ** 2
    counted = torch.ones_like(angle, dtype=torch.bool) if mask is None else mask
    return (angle + size)[counted].mean()


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 1), (2, 2)])
def test_distributed_distillation_equals_a_plain_loop(new_run: Callable[..., Path], stages: int, replicas: int) -> None:
    path = new_run("qwen", topology={"stages": stages, "replicas": replicas}, distill={"steps": STEPS})
    recipe = load_recipe(path)
    PLAN.save(recipe.plan_file)
    command("distill", path)

    losses, by_unit, weights = reference(recipe)
    scalars = read_scalars(recipe.board)
    steps = list(range(1, STEPS + 1))
    assert [step for step, _ in scalars["run/loss"]] == steps
    assert [value for _, value in scalars["run/loss"]] == pytest.approx(losses, abs=1e-5)
    for unit in PLAN.units:
        curves = [scalars[f"{unit.name}/loss/{stream}"] for stream in unit.streams]
        sums = [sum(value for _, value in points) for points in zip(*curves, strict=True)]
        assert sums == pytest.approx(by_unit[unit.name], abs=1e-5)
        trained = unit_state(newest_checkpoint(recipe.checkpoints), PLAN, unit)
        assert trained.keys() == weights[unit.name].keys()
        for key, expected in weights[unit.name].items():
            torch.testing.assert_close(trained[key], expected, rtol=0, atol=1e-5)
