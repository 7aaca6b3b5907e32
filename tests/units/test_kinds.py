"""A kind of unit is one module: a fourth one is planned, trained, plugged in and counted without a line elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
import yaml

from ppcl_ds.data.batch import Batch
from ppcl_ds.errors import UserError
from ppcl_ds.planning.budget import budget_of
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.noising import NoisyStream
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.kinds import parameters_saved
from ppcl_ds.units.plan import Plan, UnitPlan, load_plan
from ppcl_ds.watch.tensorboard import read_scalars
from tests.calls import answer
from tests.conftest import command, make_recipe
from tests.ranks import run_ranks
from tests.units.mean_attention import HEADS

STEPS = 3
PREVIEW = 8
"""Samples of a preview, as `ppcl distill` draws them."""


def plan() -> Plan:
    units = (
        UnitPlan(name="mean", kind="mean-attention", span=(6, 6), streams=("image",)),
        UnitPlan(name="span", span=(0, 1), streams=("image", "text")),
    )
    variants = {"mean": ("mean",), "both": ("mean", "span")}
    return Plan(teacher="FluxTransformer2DModel", blocks=9, units=units, variants=variants)


@pytest.fixture(scope="module")
def trained(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose library has a unit of the fourth kind beside a depth unit, one on each of two stages."""
    run = tmp_path_factory.mktemp("kinds") / "run"
    shutil.copytree(prepared("flux"), run)
    recipe = make_recipe("flux", run)
    recipe["distill"] |= {"steps": STEPS, "sample_every": STEPS}
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    plan().save(load_recipe(path).plan_file)
    run_ranks("tests.units.mean_attention", "distill", path)
    return path


def with_mean_attention(recipe: Any, state: dict[str, torch.Tensor]) -> Any:
    """The stock model, the attention of its third single block replaced by hand."""
    model = diffusers.FluxTransformer2DModel.from_pretrained(recipe.teacher.path / "transformer").eval()

    def attend(hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        heads = torch.stack(hidden_states.chunk(HEADS, dim=-1))
        return F.linear(heads.mean(0), state["image.weight"], state["image.bias"])

    model.single_transformer_blocks[2].attn.forward = attend
    return model


@torch.no_grad()
def test_it_is_trained_and_plugged_into_the_sharded_teacher(trained: Path) -> None:
    recipe = load_recipe(trained)
    teacher = open_teacher(recipe)
    assert load_plan(recipe.plan_file, teacher) == plan()
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    assert checkpoint.contents.step == STEPS
    state = checkpoint.unit("mean")
    fresh = plan().unit("mean").behaviour.build(plan().unit("mean"), teacher, torch.float32).core.state_dict()
    assert all(not torch.equal(state[name], fresh[name]) for name in fresh)

    stream = NoisyStream(recipe, teacher.call, "heldout", PREVIEW)
    [(_, clean)] = islice(stream.clean.take(0, 1), 1)
    batches = [stream.with_noise(number, Batch((sample,))) for number, sample in enumerate(clean.samples)]
    stock = diffusers.FluxTransformer2DModel.from_pretrained(recipe.teacher.path / "transformer").eval()
    models = (stock, with_mean_attention(recipe, state))
    true, own = (torch.cat([answer(model, batch.arguments) for batch in batches]) for model in models)
    [(step, figure)] = read_scalars(recipe.distillation.board)["heldout/velocity_mse/mean"]
    assert step == STEPS
    assert figure == pytest.approx(float((own - true).square().mean()), rel=1e-4)
    assert figure > 0


def test_what_it_saves_is_counted(trained: Path) -> None:
    recipe = load_recipe(trained)
    teacher = open_teacher(recipe)
    stock = diffusers.FluxTransformer2DModel.from_pretrained(recipe.teacher.path / "transformer")
    attention = sum(p.numel() for p in stock.single_transformer_blocks[2].attn.parameters())
    own = 32 // HEADS * 32 + 32
    unit = plan().unit("mean")
    assert parameters_saved(unit, teacher) == attention - own
    budget = budget_of(recipe.plan, teacher, torch.float32, plan().units)
    assert budget.saved([unit]) == attention - own


def test_only_the_modeling_file_that_travels_has_to_know_it(trained: Path) -> None:
    printed = command("consolidate", trained, "--variant", "mean", program="tests.units.mean_attention", code=2)
    assert printed.strip().splitlines()[-1] == (
        "error: unit 'mean': modeling_pruned.py, which travels with a model, has no mean-attention yet"
    )


def test_an_unknown_kind_is_refused_by_its_name(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "teacher: FluxTransformer2DModel\nblocks: 9\nvariants: {}\n"
        "units:\n  - {name: odd, kind: attention, span: [6, 6], streams: [image]}\n"
    )
    with pytest.raises(UserError, match=r"units\.0\.kind: .*'attention' is not one of depth, text, ffn"):
        load_plan(path, open_teacher(load_recipe(trained)))
