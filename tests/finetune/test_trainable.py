"""What is trained and what is not, and how a fine-tuned variant leaves the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import ppcl_ds
from ppcl_ds.finetune.trainable import joined
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.teacher.noising import NoisyStream
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.training.stages import stage_bounds
from ppcl_ds.units.kinds import boundaries_of
from ppcl_ds.units.plan import Plan, UnitPlan, load_plan
from ppcl_ds.units.variant import assembled
from tests.calls import called
from tests.conftest import command
from tests.export.trained import pretend_trained
from tests.plans import every_kind

SETTINGS = {
    "steps": 2,
    "micro_batch": 4,
    "micro_batches_per_step": 2,
    "optimizer": {"lr": 1e-2, "weight_decay": 0.0},
    "checkpoint_every": 10,
}


def new(new_run: Callable[..., Path], family: str, variant: str, **changes: Any) -> Recipe:
    """A fine-tuned variant with units of every kind; the run's recipe."""
    path = new_run(family)
    raw = yaml.safe_load(path.read_text())
    raw["finetune"] = SETTINGS | changes
    path.write_text(yaml.safe_dump(raw))
    pretend_trained(path, family, plan=every_kind(family))
    command("finetune", path, "--variant", variant)
    command("consolidate", path)
    return load_recipe(path)


def states(recipe: Recipe, variant: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A variant's tensors before fine-tuning, and as the consolidated folder has them."""
    teacher = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, teacher)
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    before: Any = assembled(teacher, plan, variant, lambda unit: checkpoint.unit(unit.name))
    after = ppcl_ds.load_model(recipe.pruned(f"{variant}-finetuned"), torch.float32)
    return before.state_dict(), after.state_dict()


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that training has changed."""
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def used(recipe: Recipe, variant: str) -> set[str]:
    """Names of the parameters that the velocity depends on: those of the text after the last block it does not."""
    model: Any = ppcl_ds.load_model(recipe.pruned(variant), torch.float32).requires_grad_(True)
    _, batch = next(NoisyStream(recipe, open_teacher(recipe).call, "train", 4).take(0, 1))
    called(model, batch.arguments).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}


@pytest.mark.parametrize("family", ["qwen", "sd3"])
def test_units_alone_are_trained_where_the_recipe_says_so(new_run: Callable[..., Path], family: str) -> None:
    """`deep`: a span, a feed-forward that is a linear, and a text group that closes the list of blocks."""
    recipe = new(new_run, family, "deep", trainable="units")
    changed = moved(*states(recipe, "deep"))
    # Of the teacher's blocks, 0 and 1 are a unit, 2 has lost its image feed-forward, 5 its text: now 0, 1 and 4.
    ffn = {"qwen": "img_mlp", "sd3": "ff"}[family]
    assert {name.split(".")[1] for name in changed} == {"0", "1", "4"}
    assert {name.rpartition(".")[0] for name in changed if ".1." in name[:22]} == {f"transformer_blocks.1.{ffn}"}
    assert {name.rpartition(".")[0] for name in changed if ".4." in name[:22]} == {"transformer_blocks.4.text_in"}


def test_neighbours_of_units_are_trained_too_and_the_units_may_be_another_runs(new_run: Callable[..., Path]) -> None:
    """`ffn`: parts of blocks 0 and 2 are units, so blocks 4, 5 and what belongs to no block are left alone."""
    library = pretend_trained(new_run("qwen"), "qwen", plan=every_kind("qwen"))
    path = new_run("qwen")
    raw = yaml.safe_load(path.read_text())
    raw["finetune"] = SETTINGS | {"trainable": "neighbours"}
    path.write_text(yaml.safe_dump(raw))
    recipe = load_recipe(path)
    shutil.copy(library.plan_file, recipe.plan_file)
    command("finetune", path, "--variant", "ffn", "--from", library.run)
    command("consolidate", path)
    command("consolidate", library.run, "--variant", "ffn")
    before = ppcl_ds.load_model(library.pruned("ffn"), torch.float32).state_dict()
    after = ppcl_ds.load_model(recipe.pruned("ffn-finetuned"), torch.float32).state_dict()
    near = tuple(f"transformer_blocks.{place}." for place in range(4))
    assert moved(before, after) == {name for name in used(library, "ffn") if name.startswith(near)}


def test_everything_is_trained_and_leaves_the_run_as_a_model(new_run: Callable[..., Path]) -> None:
    """The moving average is what is consolidated; activations that are computed again change nothing."""
    plain = new(new_run, "qwen", "mixed", ema=0.5)
    again = new(new_run, "qwen", "mixed", ema=0.5, activation_checkpointing=True)
    before, after = states(plain, "mixed")
    assert moved(before, after) == used(plain, "mixed")
    torch.testing.assert_close(states(again, "mixed")[1], after, rtol=0, atol=1e-6)
    checkpoint = newest_checkpoint(plain.finetuning("mixed").checkpoints)
    averages = {name: t for part in checkpoint.contents.units for name, t in checkpoint.unit(part, "ema").items()}
    torch.testing.assert_close({name: after[name] for name in averages}, averages, rtol=0, atol=0)
    card = (plain.pruned("mixed-finetuned").parent / "README.md").read_text()
    assert "Then the whole model was trained end to end for 2 steps, against the teacher's velocity." in card
    assert "Everything else is the teacher's, unchanged" not in card
    assert "Everything else is the teacher's, unchanged" in (plain.pruned("mixed").parent / "README.md").read_text()


def test_blocks_that_share_their_text_stay_together() -> None:
    config = {"linear_text": ["blocks.2", "blocks.3"]}
    keys = [f"blocks.{number}" for number in range(6)]
    assert stage_bounds(joined(config, keys), [1.0] * 6, 2) == [0, 4, 6]
    assert stage_bounds(joined({}, keys), [1.0] * 6, 3) == [0, 2, 4, 6]
    with pytest.raises(ppcl_ds.errors.UserError, match="can be cut into 4 stages at most; blocks with linear text"):
        stage_bounds(joined(config, keys), [1.0] * 6, 5)


def test_a_stage_with_nothing_to_train_passes_on_what_the_others_need(new_run: Callable[..., Path]) -> None:
    """Both units are on the first of two stages, and its moving average is there after a restart, too."""
    path = new_run("qwen")
    raw = yaml.safe_load(path.read_text())
    raw["finetune"] = SETTINGS | {"trainable": "units", "ema": 0.5}
    path.write_text(yaml.safe_dump(raw))
    spans = {"one": (0, 1), "two": (2, 3)}
    units = tuple(UnitPlan(name=name, span=span, streams=("image", "text")) for name, span in spans.items())
    plan = Plan(teacher="QwenImageTransformer2DModel", blocks=6, units=units, variants={"small": ("one", "two")})
    recipe = pretend_trained(path, "qwen", plan=plan)
    command("finetune", path, "--variant", "small", "--until", "1")
    shutil.rmtree(recipe.distillation.path)  # what has begun needs the library no more
    command("finetune", path, "--variant", "small")
    checkpoint = newest_checkpoint(recipe.finetuning("small").checkpoints)
    assert list(checkpoint.contents.units) == ["transformer_blocks.0", "transformer_blocks.1"]
    assert checkpoint.contents.step == 2
    command("consolidate", path)
    assert [folder.name for folder in recipe.pruned("small").parents[1].iterdir()] == ["small-finetuned"]
    command("evaluate", path)


def test_a_variant_is_compared_with_its_teacher_behind_each_unit() -> None:
    group = UnitPlan(name="group", kind="text", span=(1, 3), streams=("text",))
    line = UnitPlan(name="line", kind="ffn", span=(3, 3), streams=("image",))
    span = UnitPlan(name="span", span=(4, 5), streams=("image",))
    plan = Plan(teacher="", blocks=6, units=(group, line, span), variants={"all": ("group", "line", "span")})
    assert boundaries_of(plan, "all") == {3: (3, ("image", "text")), 4: (5, ("image",))}
