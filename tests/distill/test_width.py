"""Width units in a run: they start from least squares, and are trained beside depth units like a plain loop trains."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn

from ppcl_ds import launch
from ppcl_ds.recipe import Recipe, load_recipe, read_deepspeed_file
from ppcl_ds.teacher.noising import NoisyBatch, NoisyStream
from ppcl_ds.teacher.sharded import forget_order
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.kinds import build_unit, parameters_saved
from ppcl_ds.units.plan import Plan, conflict, load_plan
from ppcl_ds.units.plugging import borrow, plugged
from ppcl_ds.units.variant import assembled
from tests.calls import Arguments, answer
from tests.conftest import TEACHERS, command, make_recipe
from tests.plans import every_kind
from tests.ranks import run_ranks

FFN = {"qwen": ("img_mlp", "txt_mlp"), "flux": ("ff", "ff_context"), "sd3": ("ff", "ff_context")}
"""The feed-forward of the image and of the text stream."""


STEPS, CALIBRATION_STEPS, PER_STEP = 3, 3, 4


@pytest.fixture(scope="module", params=["qwen", "flux", "sd3"])
def trained(request: Any, prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with units of every kind, of two stages or two replicas, one in two goes; its recipe file."""
    run = tmp_path_factory.mktemp("width") / "run"
    shutil.copytree(prepared(request.param), run)
    recipe = make_recipe(request.param, run)
    recipe["distill"] |= {"steps": STEPS, "calibration_steps": CALIBRATION_STEPS, "micro_batches_per_step": PER_STEP}
    if request.param == "flux":
        recipe["topology"] = {"stages": 1, "replicas": 2}
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    every_kind(request.param).save(load_recipe(path).plan_file)
    if request.param == "sd3":
        command("distill", path, "--until", "1")
    command("distill", path)
    return path


Seen = dict[str, tuple[Tensor, Tensor]]
"""Output of a unit -> what it is computed from and what it should be, tokens that count only, (N, C) each."""


class StockTeacher:
    """The stock model, read by plain hooks: an independent account of what width units see."""

    def __init__(self, family: str, path: Path) -> None:
        self.recipe = load_recipe(path)
        self.model = getattr(diffusers, TEACHERS[family][0]).from_pretrained(self.recipe.teacher.path / "transformer")
        self.model.eval().requires_grad_(False)
        self.ffn = FFN[family]

    def see(self, count: int) -> list[dict[str, Seen]]:
        """What the units `group`, `line` and `thin` see of the run's first micro-batches."""
        stream = NoisyStream(self.recipe, open_teacher(self.recipe).call, "train", self.recipe.distill.micro_batch)
        return [self._see_one(batch) for _, batch in islice(stream.take(0, 1), count)]

    @torch.no_grad()
    def _see_one(self, batch: NoisyBatch) -> dict[str, Seen]:
        modulated: dict[int, Tensor] = {}
        after: dict[int, Tensor] = {}
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        handles = []
        for number, block in enumerate(self.model.transformer_blocks):

            def note_text(module: Any, args: Any, kwargs: Any, number: int = number) -> None:
                modulated[number] = kwargs["encoder_hidden_states"]

            def note_output(module: Any, args: Any, output: Any, number: int = number) -> None:
                after[number] = output[0]

            handles.append(block.attn.register_forward_pre_hook(note_text, with_kwargs=True))
            handles.append(block.register_forward_hook(note_output))
            for name in self.ffn:

                def note_part(module: Any, args: Any, output: Any, key: str = f"{number} {name}") -> None:
                    parts[key] = args[0], output

                part = getattr(block, name)
                if part is not None:
                    handles.append(part.register_forward_hook(note_part))
        answer(self.model, batch.arguments)
        for handle in handles:
            handle.remove()
        mask = batch.arguments.get("encoder_hidden_states_mask")

        def tokens(x: Tensor, text: bool) -> Tensor:
            return x[mask] if text and mask is not None else x.flatten(0, 1)

        image, text = self.ffn
        group = {f"modulated_{k}": (modulated[1], modulated[k]) for k in (2, 3)} | {"text": (after[1], after[3])}
        return {
            "group": {name: (tokens(x, True), tokens(y, True)) for name, (x, y) in group.items()},
            "line": {"image": tuple(tokens(each, False) for each in parts[f"2 {image}"])},  # type: ignore[dict-item]
            "thin": {
                "image": tuple(tokens(each, False) for each in parts[f"0 {image}"]),  # type: ignore[dict-item]
                "text": tuple(tokens(each, True) for each in parts[f"0 {text}"]),  # type: ignore[dict-item]
            },
        }


class Reference(nn.Module):
    """A width unit in plain torch and numpy: least squares first, then AdamW."""

    def __init__(self, name: str, family: str, teacher: Any, seen: list[Seen], ridge: float) -> None:
        super().__init__()
        self.outputs = nn.ModuleDict()
        for output in seen[0]:
            x, y = (torch.cat([batch[output][side] for batch in seen]).double() for side in (0, 1))
            if name == "thin":
                whole = getattr(teacher.transformer_blocks[0], FFN[family][output == "text"])
                hidden = whole.net[0](x.float())
                score = hidden.double().square().sum(0) * whole.net[2].weight.double().square().sum(0)
                kept = np.sort(np.argsort(-score.numpy())[: len(score) // 4])
                inner = nn.Linear(x.shape[1], len(kept))
                inner.load_state_dict({"weight": whole.net[0].proj.weight[kept], "bias": whole.net[0].proj.bias[kept]})
                self.outputs[output] = nn.Sequential(inner, nn.GELU("tanh"), least_squares(hidden[:, kept], y, ridge))
            else:
                self.outputs[output] = least_squares(x, y - x if name == "group" else y, ridge)
        self.residual = name == "group"

    def loss(self, seen: Seen) -> Tensor:
        total = torch.zeros(())
        for output, module in self.outputs.items():
            x, target = seen[output]
            own = module(x) + (x if self.residual else 0)
            angle = (F.normalize(own, dim=-1) - F.normalize(target, dim=-1)).square().sum(-1).mean()
            total = total + angle + (own.norm(dim=-1).log() - target.norm(dim=-1).log()).square().mean()
        return total

    def train_on(self, seen: list[Seen]) -> None:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02)
        schedule = get_cosine_schedule_with_warmup(optimizer, 1, STEPS)
        for step in range(STEPS):
            optimizer.zero_grad()
            for batch in seen[step * PER_STEP : (step + 1) * PER_STEP]:
                (self.loss(batch) / PER_STEP).backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def least_squares(x: Tensor, y: Tensor, ridge: float) -> nn.Linear:
    """`y ~ x W + b` by numpy's lstsq; the ridge as rows of its own, so that it is the same problem."""
    x, y = x.double().detach(), y.double().detach()
    x_mean, y_mean = x.mean(0), y.mean(0)
    penalty = np.sqrt(ridge * float(x.square().sum(0).mean())) * np.eye(x.shape[1])
    rows = np.concatenate([(x - x_mean).numpy(), penalty])
    sides = np.concatenate([(y - y_mean).numpy(), np.zeros((x.shape[1], y.shape[1]))])
    weight = torch.from_numpy(np.linalg.lstsq(rows, sides, rcond=None)[0])
    linear = nn.Linear(x.shape[1], y.shape[1])
    linear.load_state_dict({"weight": weight.T.float(), "bias": (y_mean - x_mean @ weight).float()})
    return linear


def test_width_units_start_from_least_squares_and_are_trained_like_a_plain_loop(trained: Path) -> None:
    recipe = load_recipe(trained)
    family = next(name for name, (cls, _) in TEACHERS.items() if cls == open_teacher(recipe).class_name)
    teacher = StockTeacher(family, trained)
    seen = teacher.see(max(STEPS, CALIBRATION_STEPS) * PER_STEP)
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    for name in ("group", "line", "thin"):
        own = [batch[name] for batch in seen]
        reference = Reference(name, family, teacher.model, own[: CALIBRATION_STEPS * PER_STEP], recipe.probe.ridge)
        start = [parameter.detach().clone() for parameter in reference.parameters()]
        reference.train_on(own)
        ends = list(reference.parameters())
        found = list(checkpoint.unit(name).values())
        assert [tensor.shape for tensor in found] == [parameter.shape for parameter in ends]
        for mine, end, begin in zip(found, ends, start, strict=True):
            torch.testing.assert_close(mine, end.detach(), rtol=0, atol=2e-5)
            assert (end - begin).abs().max() > 1e-4, "it has been trained"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def with_random_variants(plan: Plan) -> Plan:
    """The plan's variants, and six random sets of units that go together."""
    random = np.random.default_rng(3)
    drawn = dict(plan.variants)
    while len(drawn) < len(plan.variants) + 6:
        units = [unit for unit in plan.units if random.random() < 0.5]
        if units and not any(conflict(a, b) for a, b in combinations(units, 2)):
            drawn[f"random {len(drawn)}"] = tuple(unit.name for unit in units)
    return plan.model_copy(update={"variants": drawn})


def be_a_rank(path: Path) -> None:
    """Plug every variant into the sharded teacher, its units on two ranks; write its velocities down."""
    launch.join()
    from ppcl_ds.teacher.sharded import load_teacher

    recipe = load_recipe(path)
    teacher = open_teacher(recipe)
    plan = with_random_variants(load_plan(recipe.plan_file, teacher))
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    owner = {unit.name: place % 2 for place, unit in enumerate(plan.units)}
    own = [unit for unit in plan.units if owner[unit.name] == rank]
    found = {}
    for name, dtype in DTYPES.items():
        read = heldout(recipe, name)
        units = {unit.name: build_unit(unit, teacher, dtype) for unit in own}
        for unit in own:
            units[unit.name].core.load_state_dict(checkpoint.unit(unit.name))
            units[unit.name].free_calibration()
        sharded = load_teacher(teacher, read_deepspeed_file(recipe.deepspeed.teacher), dtype, None)
        for variant in plan.variants:
            wanted = plan.units_of(variant)
            lent = borrow(wanted, units, owner, group, teacher, dtype, torch.device("cpu"))
            with plugged(sharded.module, teacher.anatomy, plan, variant, lent):
                found[name, variant] = answer(sharded, read)
            forget_order(sharded)
        found[name, "teacher"] = answer(sharded, read)
    torch.save(found, path.parent / f"velocities {rank}.pt")
    launch.leave()
    launch.end()


def heldout(recipe: Recipe, precision: str) -> Arguments:
    """What a transformer of that precision is called with for the first held-out micro-batch."""
    asked = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"precision": precision})})
    [(_, batch)] = islice(NoisyStream(asked, open_teacher(asked).call, "heldout", 4).take(0, 1), 1)
    return batch.arguments


def test_a_variant_in_a_run_and_on_its_own_are_the_same_to_the_bit(trained: Path) -> None:
    run_ranks("tests.distill.test_width", trained)
    recipe = load_recipe(trained)
    teacher = open_teacher(recipe)
    plan = with_random_variants(load_plan(recipe.plan_file, teacher))
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    ranks = [torch.load(trained.parent / f"velocities {rank}.pt") for rank in range(2)]
    outputs = [ranks[0]["fp32", "teacher"]]
    for name, dtype in DTYPES.items():
        read = heldout(recipe, name)
        for variant in plan.variants:
            model: Any = assembled(teacher, plan, variant, lambda unit: checkpoint.unit(unit.name))
            for key, tensor in model.state_dict(keep_vars=True).items():  # stored buffers, too
                tensor.data = tensor.data.to(teacher.files.runs_as(key, dtype))
            output = answer(model, read)
            for found in ranks:
                assert torch.equal(found[name, variant], output), (name, variant)
            if name == "fp32":
                outputs.append(output)
    sizes = {variant: plan.units_of(variant) for variant in plan.variants}
    whole = sum(p.numel() for p in teacher.empty.parameters())
    for variant, units in sizes.items():
        saved = sum(parameters_saved(unit, teacher) for unit in units)
        model = assembled(teacher, plan, variant, lambda unit: checkpoint.unit(unit.name))
        assert sum(p.numel() for p in model.parameters()) == whole - saved
    distinct = {frozenset(names) for names in plan.variants.values()}
    assert len({tuple(each.flatten().tolist()) for each in outputs}) == len(distinct) + 1


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
