"""Which steps a chain has, from what a run folder holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ppcl_ds.errors import UserError
from ppcl_ds.prompt_sets import PromptSet
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.sections import Finetune
from ppcl_ds.steps import Step, due, steps

PARTS = 8
VARIANTS = ["medium", "small"]
FIGURES = ("samples.png", "report.json", "report.html")
ALL = ["encode", "probe", "merge", "plan", "distill", "consolidate", "evaluate"]


@pytest.fixture
def recipe(new_run: Callable[..., Path]) -> Recipe:
    """Nothing but encoded shards and a teacher."""
    return load_recipe(new_run("qwen"))


def jobs(recipe: Recipe, start: str | None = None) -> list[Step]:
    """Those that a cluster is given."""
    return due(steps(recipe, VARIANTS, PARTS)[1:], start)


def names(recipe: Recipe, start: str | None = None) -> list[str]:
    return [step.name for step in jobs(recipe, start)]


def touch(path: Path, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_what_is_done_is_left_out(recipe: Recipe) -> None:
    assert names(recipe) == ALL[1:]
    touch(recipe.probe_folder / "report.json")
    assert names(recipe) == ALL[3:]
    touch(recipe.plan_file)
    assert names(recipe) == ALL[4:]
    touch(recipe.distillation.checkpoints / "latest", f"step-{recipe.distill.steps:06d}")
    assert names(recipe) == ALL[5:]
    for variant in VARIANTS:
        touch(recipe.pruned(variant) / "config.json")
    assert names(recipe) == ALL[6:]
    for name in FIGURES:
        touch(recipe.run / name)
    assert names(recipe) == []


def test_prompt_sets_are_drawn_on_all_processes(recipe: Recipe) -> None:
    assert not jobs(recipe)[-1].ranks
    one = PromptSet(name="words", prompts=Path("prompts.txt"))
    drawing = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"sets": (one,)})})
    assert (jobs(drawing)[-1].name, jobs(drawing)[-1].ranks) == ("evaluate", True)


def test_fine_tuned_variants_are_consolidated_too(recipe: Recipe) -> None:
    tuning = Finetune(steps=9, micro_batch=1, micro_batches_per_step=2, variants=("small",))
    tuned = recipe.model_copy(update={"finetune": tuning})
    chain = {step.name: step for step in jobs(tuned)}
    assert [*chain] == [*ALL[1:5], "finetune", *ALL[5:]]
    assert chain["finetune"].variants == ("small",)
    assert chain["consolidate"].variants == ("medium", "small", "small-finetuned")
    touch(recipe.plan_file)
    touch(recipe.distillation.checkpoints / "latest", f"step-{recipe.distill.steps:06d}")
    assert names(tuned)[0] == "finetune"
    touch(recipe.finetuning("small").checkpoints / "latest", "step-000009")
    assert names(tuned)[0] == "consolidate"


def test_a_plan_of_ones_own_needs_no_probe(recipe: Recipe) -> None:
    touch(recipe.plan_file)
    (recipe.data.shards / "encoded" / "index.json").unlink()
    assert names(recipe) == ["encode", *ALL[4:]]


def test_what_is_made_of_something_new_is_made_again(recipe: Recipe) -> None:
    touch(recipe.plan_file)
    for name in FIGURES:
        touch(recipe.run / name)
    for variant in VARIANTS:
        touch(recipe.pruned(variant) / "config.json")
    assert names(recipe) == ["distill", "consolidate", "evaluate"]


def test_a_chain_begins_where_it_is_told_to(recipe: Recipe) -> None:
    assert names(recipe, "encode") == ALL
    with pytest.raises(UserError, match="--from distill: plan has not been done"):
        names(recipe, "distill")
    with pytest.raises(UserError, match="--from destill: there is no such step; the steps are encode, "):
        names(recipe, "destill")
    for part in range(1, 1 + PARTS):
        touch(recipe.probe_folder / "parts" / f"part-{part:03d}-of-{PARTS:03d}.safetensors")
    assert names(recipe, "merge") == ALL[2:]
    touch(recipe.plan_file)
    assert names(recipe, "distill") == ALL[4:]


def test_a_probe_of_one_part_is_merged_by_nobody(recipe: Recipe) -> None:
    table = {step.name: step for step in steps(recipe, VARIANTS, 1)}
    assert "merge" not in table
    assert (table["probe"].array, table["plan"].needs) == ("1-1", ("probe",))
