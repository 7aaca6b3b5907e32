"""The backbone: a variant fine-tuned over pipeline stages learns what a plain single-process torch loop learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.recipe import Recipe, checkpoint_tag, load_recipe
from ppcl_ds.teacher.noising import NoisyStream
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.teacher.trajectories import TrajectoryStream
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.units.variant import assembled
from ppcl_ds.watch.tensorboard import read_scalars
from tests.calls import answer, called
from tests.conftest import TEACHERS, command, mix_shapes
from tests.export.trained import pretend_trained
from tests.reference import PlainAdamW, distance

STEPS = 8
SETTINGS = {
    "steps": STEPS,
    "micro_batch": 4,
    "micro_batches_per_step": 4,
    "flow_weight": 0.25,
    "velocity_weight": 1.0,
    "boundary_weight": 0.125,
    "kept_lr": 0.5,
    "ema": 0.75,
    "optimizer": {"lr": 1e-3, "warmup_steps": 1, "clip_norm": 0.5},
    "log_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": STEPS,
}
TOPOLOGIES = {"qwen": [(1, 1), (2, 1), (4, 1), (2, 2)], "flux": [(2, 1), (2, 2)], "sd3": [(2, 1), (2, 2)]}
"""Stages and replicas; a run goes on with the next pair a step later than the one before, for at least five steps."""

SPANS = {
    "qwen": {"early": (0, 1), "late": (4, 5)},
    "flux": {"early": (1, 3), "late": (5, 6)},  # one in either list of blocks
    "sd3": {"early": (1, 2), "late": (3, 4)},
}
BLOCKS = {"qwen": 6, "flux": 9, "sd3": 6}
PLACES = {"qwen": {0: 1, 1: 2, 3: 5}, "flux": {1: 3, 3: 6}, "sd3": {1: 2, 2: 4}}
"""Family -> block of the variant that is or has a unit -> the teacher's block that it should end like."""
WIDTH = {"qwen": {1: ("img_mlp.", "txt_mlp.")}, "flux": {}, "sd3": {}}
"""Family -> block of the variant -> the parts of it that are units; of other blocks with units, all of it is one."""


def plan_of(family: str) -> Plan:
    """Two depth units, nobody reads the text after the last block; and where `WIDTH` says so, a narrowed block."""
    units = [
        UnitPlan(name=name, span=span, streams=("image",) if span[1] == BLOCKS[family] - 1 else ("image", "text"))
        for name, span in SPANS[family].items()
    ]
    for place in WIDTH[family]:
        block = PLACES[family][place]
        units.append(UnitPlan(name="thin", kind="ffn", span=(block, block), streams=("image", "text"), keep=0.25))
    variants = {"small": tuple(unit.name for unit in units)}
    return Plan(teacher=TEACHERS[family][0], blocks=BLOCKS[family], units=tuple(units), variants=variants)


@dataclass
class Reference:
    """What one process that knows no DeepSpeed finds; lists by step."""

    losses: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)


def blocks_of(model: Any) -> list[Any]:
    """All blocks in the order in which they run."""
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]


def reference(recipe: Recipe, plan: Plan, family: str) -> Reference:
    """The plain loop, in float32; of a bf16 run it reads what that run reads."""
    found = Reference()
    opened = open_teacher(recipe)
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    student: Any = assembled(opened, plan, "small", lambda unit: checkpoint.unit(unit.name)).requires_grad_(True).eval()
    teacher: Any = opened.files.model_class.from_pretrained(opened.files.folder).eval()
    settings = recipe.finetune
    assert settings is not None
    units = {
        id(parameter)
        for place in PLACES[family]
        for name, parameter in blocks_of(student)[place].named_parameters()
        if name.startswith(WIDTH[family].get(place, ""))
    }
    kept = {name: settings.kept_lr for name, parameter in student.named_parameters() if id(parameter) not in units}
    optimizer = PlainAdamW(student.named_parameters(), settings.optimizer, STEPS, kept)
    seen: dict[str, dict[int, Any]] = {"student": {}, "teacher": {}}
    for name, model in (("student", student), ("teacher", teacher)):
        for place, block in enumerate(blocks_of(model)):
            block.register_forward_hook(partial(note, seen[name], place))
    count = settings.micro_batches_per_step
    way, size = settings.trajectories, settings.micro_batch
    data: NoisyStream | TrajectoryStream = NoisyStream(recipe, opened.call, "train", size, count)
    if way is not None:
        data = TrajectoryStream(recipe, opened.call, "train", size, count, way)
    stream = data.take(0, 1)
    for step in range(STEPS):
        sums: dict[str, float] = {}
        for _, batch in islice(stream, count):
            arguments = pytree.tree_map_only(
                Tensor, lambda t: t.float() if t.is_floating_point() else t, batch.arguments
            )
            true, own = answer(teacher, arguments), called(student, arguments)
            mask = batch.arguments.get("encoder_hidden_states_mask")
            losses = {"velocity/loss": F.mse_loss(own, true)}
            if isinstance(data, NoisyStream):
                losses["flow/loss"] = F.mse_loss(own, batch.target)
            for place, block in PLACES[family].items():
                mine, theirs = seen["student"][place], seen["teacher"][block]
                pairs = {"image": (mine[1], theirs[1], None), "text": (mine[0], theirs[0], mask)}
                unit = next(unit for unit in plan.units if unit.span[1] == block)
                for name in unit.streams:
                    losses[f"boundary/{place}/{name}/loss"] = distance(*pairs[name])
            if isinstance(data, TrajectoryStream) and batch.number is not None:
                assert way is not None
                assert batch.other is not None
                said = own.detach() if way.of == "student" else true
                data.advance(batch.number, said, answer(teacher, batch.other))
            weights = {"flow": settings.flow_weight, "velocity": settings.velocity_weight, "boundary": 0.125}
            total = torch.stack([weights[name.split("/")[0]] * loss for name, loss in losses.items()]).sum()
            (total / count).backward()
            optimizer.add_gradients()
            for name, loss in {**losses, "run/loss": total}.items():
                sums[name] = sums.get(name, 0.0) + loss.item() / count
        found.losses.append(sums)
        found.norms.append(optimizer.step())
        found.weights = {name: master.clone() for name, master in optimizer.masters.items()}
        found.moments = {name: moment.clone() for name, moment in optimizer.moment("exp_avg").items()}
        before, decay = found.averages or found.weights, min(settings.ema, (2 + step) / (11 + step))
        found.averages = {name: before[name].lerp(now, 1 - decay) for name, now in found.weights.items()}
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def note(seen: dict[int, Any], place: int, module: Any, arguments: Any, output: Any) -> None:
    seen[place] = output


def prepare(new_run: Callable[..., Path], family: str, plan: Plan, **changes: Any) -> Path:
    """A run whose library is trained, and whose micro-batches have two latent shapes."""
    path = new_run(family)
    mix_shapes(path)
    raw = yaml.safe_load(path.read_text())
    raw["finetune"] = SETTINGS | changes
    path.write_text(yaml.safe_dump(raw))
    pretend_trained(path, family, plan=plan)
    return path


def tune(path: Path, step: int, stages: int, replicas: int) -> Recipe:
    """Run `ppcl finetune` to the end on a topology, going on after `step`."""
    raw = yaml.safe_load(path.read_text())
    raw["topology"] = {"stages": stages, "replicas": replicas}
    path.write_text(yaml.safe_dump(raw))
    recipe = load_recipe(path)
    if step:
        (recipe.finetuning("small").checkpoints / "latest").write_text(checkpoint_tag(step))
    command("finetune", path, "--variant", "small")
    return recipe


def tensors_of(recipe: Recipe, what: str) -> dict[str, Tensor]:
    """Everything that was trained, by its name in the model."""
    checkpoint = newest_checkpoint(recipe.finetuning("small").checkpoints)
    assert checkpoint.contents.step == STEPS
    return {key: tensor for part in checkpoint.contents.units for key, tensor in checkpoint.unit(part, what).items()}


@pytest.mark.parametrize("family", ["qwen", "flux", "sd3"])
def test_a_run_that_changes_its_topology_equals_a_plain_loop(new_run: Callable[..., Path], family: str) -> None:
    """Every topology takes the run to its end; the next one goes on a step later."""
    plan = plan_of(family)
    path = prepare(new_run, family, plan, activation_checkpointing=family == "flux")
    found = reference(load_recipe(path), plan, family)
    assert any(norm > 0.5 for norm in found.norms)
    for step, (stages, replicas) in enumerate(TOPOLOGIES[family]):
        recipe = tune(path, step, stages, replicas)
        scalars = read_scalars(recipe.finetuning("small").board)
        for name in found.losses[0]:
            values = [value for _, value in scalars[name]]
            assert values == pytest.approx([losses[name] for losses in found.losses], rel=0, abs=1e-5), name
        norms = [math.sqrt(sum(v**2 for v in each)) for each in part_norms(scalars)]
        assert norms == pytest.approx(found.norms, rel=1e-5)
        torch.testing.assert_close(tensors_of(recipe, "master"), found.weights, rtol=0, atol=1e-5)
        torch.testing.assert_close(tensors_of(recipe, "ema"), found.averages, rtol=0, atol=1e-5)
        torch.testing.assert_close(tensors_of(recipe, "exp_avg"), found.moments, rtol=0, atol=1e-5)


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_on_trajectories_too(new_run: Callable[..., Path], of: str) -> None:
    """Of the variant's own, what it says of one branch is its own, and the teacher's of the other."""
    plan = plan_of("qwen")
    way = {"steps": [2, 4], "guidance": [1.5, 3.0], "of": of}
    path = prepare(new_run, "qwen", plan, trajectories=way, flow_weight=0.0)
    found = reference(load_recipe(path), plan, "qwen")
    for step, (stages, replicas) in enumerate([(1, 1), (2, 1), (2, 2), (4, 1)]):
        recipe = tune(path, step, stages, replicas)
        curves = read_scalars(recipe.finetuning("small").board)
        for name in found.losses[0]:
            values = [value for _, value in curves[name]]
            assert values == pytest.approx([losses[name] for losses in found.losses], rel=0, abs=1e-5), name
        torch.testing.assert_close(tensors_of(recipe, "master"), found.weights, rtol=0, atol=1e-5)


def part_norms(scalars: dict[str, list[tuple[int, float]]]) -> list[tuple[float, ...]]:
    """Step by step, the gradient norm of every part."""
    curves = [[v for _, v in points] for name, points in scalars.items() if name.endswith("/gradient_norm")]
    return list(zip(*curves, strict=True))


def test_in_bf16_it_follows_the_plain_loop(new_run: Callable[..., Path]) -> None:
    """Parameters and what goes between stages are rounded, gradients and weights are summed up in float32."""
    plan = plan_of("qwen")
    path = prepare(new_run, "qwen", plan, ema=0.0)
    raw = yaml.safe_load(path.read_text())
    raw["teacher"]["precision"] = "bf16"
    path.write_text(yaml.safe_dump(raw))
    found = reference(load_recipe(path), plan, "qwen")
    recipe = tune(path, 0, 2, 1)
    losses = [value for _, value in read_scalars(recipe.finetuning("small").board)["run/loss"]]
    assert losses == pytest.approx([losses["run/loss"] for losses in found.losses], rel=0.02)
    for name, tensor in tensors_of(recipe, "master").items():
        assert tensor.dtype == torch.float32
        assert float((tensor - found.weights[name]).norm()) <= 2**-7 * float(found.weights[name].norm()) + 1e-3, name
