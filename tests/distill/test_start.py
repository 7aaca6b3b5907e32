"""Where depth units start, against plain torch on the stock model: the same on any topology and after a restart."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from torch import Tensor

from ppcl_ds.distill.start import tiles
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.noising import NoisyStream
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.plan import Plan, UnitPlan
from tests.conftest import command, make_recipe
from tests.distill.test_backbone import watch
from tests.reference import distance

STEPS, CALIBRATION_STEPS, PER_STEP = 3, 2, 4
SETTINGS = {
    "steps": STEPS,
    "micro_batches_per_step": PER_STEP,
    "calibration_steps": CALIBRATION_STEPS,
    "checkpoint_every": 1,
    "keep_checkpoints": STEPS,
}
"""The first step is one of warm-up, whose learning rate is zero: the checkpoint after it has what units start from."""
BOTH = ("image", "text")
Weights = dict[str, Tensor]


def plan_of(*spans: tuple[int, int]) -> Plan:
    units = [UnitPlan(name=f"u{u}{v}", span=(u, v), streams=BOTH if v < 5 else ("image",)) for u, v in spans]
    return Plan(teacher="QwenImageTransformer2DModel", blocks=6, units=tuple(units), variants={"a": (units[0].name,)})


PLAN = plan_of((0, 2), (1, 3), (3, 5))
PAIRS = plan_of((1, 2), (3, 4))


def stock(path: Path) -> Any:
    folder = load_recipe(path).teacher.path / "transformer"
    return diffusers.QwenImageTransformer2DModel.from_pretrained(folder).eval().requires_grad_(False)


def started(path: Path, plan: Plan, stages: int = 1, replicas: int = 1) -> dict[str, Weights]:
    """What the units of a run start from."""
    raw = yaml.safe_load(path.read_text())
    raw["topology"] = {"stages": stages, "replicas": replicas}
    path.write_text(yaml.safe_dump(raw))
    recipe = load_recipe(path)
    plan.save(recipe.plan_file)
    command("distill", path, "--until", "1")
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    return {unit.name: checkpoint.unit(unit.name) for unit in plan.units}


def mean(states: Sequence[Weights]) -> Weights:
    return {name: torch.stack([state[name] for state in states]).double().mean(0).float() for name in states[0]}


class Plain:
    """Single blocks of the stock model on what it computes for the micro-batches of the first steps."""

    def __init__(self, path: Path) -> None:
        recipe = load_recipe(path)
        self.model = stock(path)
        self.blocks = self.model.transformer_blocks
        stream = NoisyStream(recipe, open_teacher(recipe).call, "train", recipe.distill.micro_batch)
        batches = [batch for _, batch in islice(stream.take(0, 1), CALIBRATION_STEPS * PER_STEP)]
        self.seen = [
            (batch.arguments["encoder_hidden_states_mask"], *watch(self.model, batch)[:2]) for batch in batches
        ]

    def loss(self, unit: UnitPlan, block: Any) -> float:
        total = 0.0
        for mask, calls, outputs in self.seen:
            text, image = block(**calls[unit.span[0]])
            true_text, true_image = outputs[unit.span[1]]
            total += float(distance(image, true_image, None))
            total += float(distance(text, true_text, mask)) if "text" in unit.streams else 0.0
        return total

    def factor(self, unit: UnitPlan, stream: str) -> float:
        """By which what the first block adds is most like what the span adds."""
        above, below = 0.0, 0.0
        for mask, calls, outputs in self.seen:
            call, place = calls[unit.span[0]], BOTH[::-1].index(stream)
            entering = call["hidden_states" if stream == "image" else "encoder_hidden_states"]
            counts = mask if stream == "text" else torch.ones(entering.shape[:2], dtype=torch.bool)
            own, true = self.blocks[unit.span[0]](**call)[place], outputs[unit.span[1]][place]
            added, wanted = (own - entering)[counts].double(), (true - entering)[counts].double()
            above, below = above + float((added * wanted).sum()), below + float((added**2).sum())
        return above / below

    def scaled(self, unit: UnitPlan) -> Any:
        block = copy.deepcopy(self.blocks[unit.span[0]])
        image, text = [block.attn.to_out[0], block.img_mlp.net[2]], [block.attn.to_add_out, block.txt_mlp.net[2]]
        for stream, linears in (("image", image), ("text", text)):
            for linear in linears if stream in unit.streams else []:
                factor = self.factor(unit, stream)
                linear.weight.data *= factor
                linear.bias.data *= factor
        return block

    def expected(self, unit: UnitPlan, how: str) -> Weights:
        span = [self.blocks[number] for number in range(unit.span[0], unit.span[1] + 1)]
        if how == "mean":
            return mean([block.state_dict() for block in span])
        tried = {"first": span[:1], "best": span, "scaled": [span[0], self.scaled(unit)]}[how]
        return dict(min(tried, key=lambda block: self.loss(unit, block)).state_dict())


@pytest.mark.parametrize("how", ["first", "mean", "best", "scaled"])
def test_units_start_as_the_recipe_says_on_any_topology(how: str, new_run: Callable[..., Path]) -> None:
    path = new_run("qwen", distill=SETTINGS | {"start": how})
    plain = Plain(path)
    for stages, replicas in ((1, 1), (2, 1), (1, 2)):
        found = started(path, PLAN, stages, replicas)
        for unit in PLAN.units:
            torch.testing.assert_close(found[unit.name], plain.expected(unit, how), rtol=1e-5, atol=1e-7)
        shutil.rmtree(load_recipe(path).distillation.path)
    if how == "best":
        firsts = [plain.blocks[unit.span[0]].attn.to_q.weight for unit in PLAN.units]
        own = [found[unit.name]["attn.to_q.weight"] for unit in PLAN.units]
        assert not all(torch.equal(one, other) for one, other in zip(firsts, own, strict=True))


def test_a_second_round_starts_from_the_first_and_goes_on_without_it(new_run: Callable[..., Path]) -> None:
    """On other topologies, too, and after a restart, when the first round may be gone."""
    first = new_run("qwen", distill=SETTINGS)
    PAIRS.save(load_recipe(first).plan_file)
    command("distill", first)
    earlier = newest_checkpoint(load_recipe(first).distillation.checkpoints)
    pairs = {unit.span: earlier.unit(unit.name) for unit in PAIRS.units}
    second = new_run("qwen", distill=SETTINGS | {"start": "mean", "start_from": str(first.parent)})
    plan, blocks = (
        plan_of((0, 2), (1, 2), (2, 5), (4, 5)),
        [dict(b.state_dict()) for b in stock(second).transformer_blocks],
    )
    expected = {
        "u02": mean([blocks[0], pairs[1, 2]]),
        "u12": pairs[1, 2],
        "u25": mean([blocks[2], pairs[3, 4], blocks[5]]),
        "u45": mean(blocks[4:]),
    }
    ends = []
    for stages in (1, 2):
        found = started(second, plan, stages)
        for name, weights in expected.items():
            torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=1e-7)
        assert torch.equal(found["u12"]["attn.to_q.weight"], pairs[1, 2]["attn.to_q.weight"])
        recipe = load_recipe(second)
        if stages == 2:
            shutil.rmtree(first.parent)
        command("distill", second)
        checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
        ends.append({name: checkpoint.unit(name) for name in expected})
        shutil.rmtree(recipe.distillation.path)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("span", "units", "cut"),
    [
        ((2, 5), [], [(2, 2), (3, 3), (4, 4), (5, 5)]),
        ((2, 5), [(2, 5), (2, 3)], [(2, 5)]),
        ((2, 5), [(2, 3), (4, 5), (3, 4)], [(2, 3), (4, 5)]),
        ((2, 5), [(1, 3), (3, 4), (5, 6)], [(2, 2), (3, 4), (5, 5)]),
        ((0, 4), [(0, 1), (0, 2), (3, 4), (2, 4)], [(0, 2), (3, 4)]),
    ],
)
def test_a_span_is_cut_into_the_fewest_pieces(
    span: tuple[int, int], units: list[tuple[int, int]], cut: list[tuple[int, int]]
) -> None:
    assert tiles(span, units) == cut


def test_blocks_of_unlike_shapes_have_no_mean(new_run: Callable[..., Path]) -> None:
    """Blocks 0 and 1 of the tiny SD3 have a second attention, the others none."""
    path = new_run("sd3", distill=SETTINGS | {"start": "mean"})
    units = (UnitPlan(name="mixed", span=(1, 2), streams=BOTH), UnitPlan(name="alike", span=(2, 3), streams=BOTH))
    plan = Plan(teacher="SD3Transformer2DModel", blocks=6, units=units, variants={"a": ("alike",)})
    plan.save(load_recipe(path).plan_file)
    printed = command("distill", path, "--until", "1")
    assert printed.count("note: unit 'mixed' starts from its first block: those of [1, 2] are not shaped alike") == 1
    assert "unit 'alike'" not in printed
    checkpoint = newest_checkpoint(load_recipe(path).distillation.checkpoints)
    model = diffusers.SD3Transformer2DModel.from_pretrained(load_recipe(path).teacher.path / "transformer")
    blocks = [dict(block.state_dict()) for block in model.transformer_blocks]
    torch.testing.assert_close(checkpoint.unit("mixed"), blocks[1])
    torch.testing.assert_close(checkpoint.unit("alike"), mean(blocks[2:4]), rtol=1e-5, atol=1e-7)


def test_what_cannot_be_started_from_is_one_line(new_run: Callable[..., Path]) -> None:
    path, other = new_run("qwen", distill=SETTINGS), new_run("qwen", distill=SETTINGS)
    plan_of((4, 5)).save(load_recipe(path).plan_file)
    PAIRS.save(load_recipe(other).plan_file)
    command("distill", other, "--until", "1")
    raw = yaml.safe_load(path.read_text()) | {"topology": {"stages": 1}}

    def refused(run: Path) -> str:
        raw["distill"]["start_from"] = str(run)
        path.write_text(yaml.safe_dump(raw))
        return command("distill", path, code=2).strip().splitlines()[-1]

    assert f"distill.start_from: {path.parent / 'nowhere'} has no checkpoint" in refused(path.parent / "nowhere")
    assert "is the folder of this run" in refused(path.parent)
    assert f"no unit of {other.parent} lies in a span" in refused(other.parent)
    trained = other.parent / "distill" / "plan.yaml"
    trained.write_text(trained.read_text().replace("blocks: 6", "blocks: 7"))
    assert "with 7 blocks" in refused(other.parent)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start": "worst"}, "distill.start"),
        ({"level_weights": {0.5: 0}}, "all weights are 0"),
        ({"level_weights": {1.5: 1}}, "level_weights"),
        ({"branch_weight": 1, "trajectories": {}}, "branch_weight needs noisy images"),
        ({"trajectories": {"of": "student"}}, "trajectories.of: student is for finetune"),
        ({"branch_weight": 1, "micro_batch": 1}, "set micro_batch to 2 or more"),
    ],
)
def test_what_a_recipe_cannot_ask_for_is_one_line(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    recipe = make_recipe("qwen", tmp_path)
    recipe["distill"] |= changes
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=re.escape(said)) as fault:
        load_recipe(path)
    assert "\n" not in str(fault.value)
