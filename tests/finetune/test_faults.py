"""What is wrong with a fine-tuning is said in one line before a process starts; what it will need, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import ACCELERATORS
from ppcl_ds.estimate.estimate import size
from ppcl_ds.estimate.inputs import read_inputs
from ppcl_ds.finetune.finetune import check, newer_units
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.files import empty_model
from tests.conftest import command
from tests.export.trained import pretend_trained, write_checkpoint
from tests.plans import image_spans

Raw = dict[str, Any]


def ready(new_run: Callable[..., Path]) -> tuple[Path, Raw]:
    """A recipe whose library is trained, and what it says."""
    path = new_run("qwen")
    raw = yaml.safe_load(path.read_text())
    raw["finetune"] = {"steps": 2, "micro_batch": 2, "micro_batches_per_step": 2}
    path.write_text(yaml.safe_dump(raw))
    pretend_trained(path, "qwen")
    return path, raw


def clip(raw: Raw) -> None:
    folder = Path(raw["run"])
    (folder / "students.json").write_text('{"gradient_clipping": 1.0}')
    raw["deepspeed"] = {"students": str(folder / "students.json")}


CHANGES: dict[str, Callable[[Raw], object]] = {
    "the recipe has no section 'finetune'": lambda raw: raw.pop("finetune"),
    "variant 'tiny' is not in the plan; it has: small, medium": lambda raw: raw.update(variant="tiny"),
    "topology.stages is 8, but the variant's 3 blocks can be cut into 3": lambda raw: raw.update(
        topology={"stages": 8},
        finetune=raw["finetune"] | {"micro_batches_per_step": 8},
        distill=raw["distill"] | {"micro_batches_per_step": 8},
    ),
    "recipe key finetune.optimizer.clip_norm says it": clip,
    "no checkpoint in .*; run `ppcl distill` first": lambda raw: Path(
        raw["run"], "distill", "checkpoints", "latest"
    ).unlink(),
    "elsewhere is not the folder of a run that was trained": lambda raw: raw.update(from_run="elsewhere"),
}


@pytest.mark.parametrize("problem", CHANGES)
def test_a_fault_is_named_before_anything_starts(new_run: Callable[..., Path], problem: str, tmp_path: Path) -> None:
    path, raw = ready(new_run)
    CHANGES[problem](raw)
    variant, library = raw.pop("variant", "small"), raw.pop("from_run", None)
    if library:
        (tmp_path / library).mkdir()
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=problem):
        check(load_recipe(path), variant, tmp_path / library if library else None)


def test_a_begun_fine_tuning_goes_on_only_as_it_began(new_run: Callable[..., Path]) -> None:
    path, raw = ready(new_run)
    recipe = load_recipe(path)
    command("finetune", path, "--variant", "small", "--until", "1")
    check(recipe, "small", None)
    for key, value in (("velocity_weight", 0.5), ("trainable", "units"), ("micro_batch", 4)):
        path.write_text(yaml.safe_dump(raw | {"finetune": raw["finetune"] | {key: value}}))
        with pytest.raises(UserError, match=f"recipe key 'finetune.{key}' is not what .* was trained with"):
            check(load_recipe(path), "small", None)
    plan = recipe.plan_file.read_text()
    recipe.plan_file.write_text(plan.replace("span: [3, 4]", "span: [2, 4]").replace("[early, late]", "[late]"))
    with pytest.raises(UserError, match=r"was trained with other units than .* has, such as 'late'"):
        check(recipe, "small", None)
    recipe.plan_file.write_text(plan.replace("[early, late]", "[late]"))
    with pytest.raises(UserError, match=r"was trained with other units than 'small' in .* has now"):
        check(recipe, "small", None)


def test_units_that_have_learnt_more_since_are_spoken_of(new_run: Callable[..., Path]) -> None:
    path, _ = ready(new_run)
    recipe = load_recipe(path)
    command("finetune", path, "--variant", "small", "--until", "1")
    assert not newer_units(recipe.finetuning("small"))
    write_checkpoint(recipe, image_spans("qwen"), 1, step=9)
    printed = command("finetune", path, "--variant", "small")
    assert printed.count("goes on from units of step 7;") == 1
    assert "has them of step 9; to fine-tune those, move " in printed


def test_the_estimate_counts_what_a_stage_holds(new_run: Callable[..., Path]) -> None:
    path = new_run("qwen")
    raw = yaml.safe_load(path.read_text())
    raw["finetune"] = {"steps": 2, "micro_batch": 2, "micro_batches_per_step": 6}
    raw |= {"topology": {"stages": 3}, "distill": raw["distill"] | {"micro_batches_per_step": 6}}
    path.write_text(yaml.safe_dump(raw))
    recipe = pretend_trained(path, "qwen")
    begin = check(recipe, "small", None)
    whole = begin.layout()
    model = empty_model(whole.config)
    tuning = size(read_inputs(recipe, 1, 3, variant="small"), ACCELERATORS["h100"])
    assert tuning.parameters == whole.parameters
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.transformer_blocks]  # type: ignore[union-attr]
    rest = whole.parameters - sum(blocks)
    assert [stage.parameters for stage in tuning.stages] == blocks
    for stage, own in zip(tuning.stages, blocks, strict=True):
        assert stage.memory.resident["gradients"] == 4 * (own + rest)
        assert stage.memory.resident["optimizer"] == 12 * (own + rest)
    step = {phase.name: phase for phase in tuning.step}
    assert (tuning.micro_batches, step["pipeline"].waits) == (6, pytest.approx(2 / 8))
    # 1F1B: the first stage holds the activations of three micro-batches, the last one's of one.
    flights = [stage.memory.phases["pipeline"]["activations in flight"] for stage in tuning.stages]
    assert flights == [3 * flights[-1], 2 * flights[-1], flights[-1]]
    # The second stage sends streams on and gradients back, for six micro-batches.
    streams = 2 * sum(tuning.tokens.values()) * 32 * 4
    assert (step["pipeline"].moved.intra, step["pipeline"].moved.inter) == (6 * 2 * streams, 0)
    assert tuning.fits
    assert tuning.smallest == replace(tuning.cluster, gpus_per_node=1, stages=1)
    # The first two of the variant's three blocks are units.
    for trainable, trained in (("units", [*blocks[:2], 0]), ("neighbours", blocks)):
        fewer = recipe.model_copy(update={"finetune": begin.settings.model_copy(update={"trainable": trainable})})
        stages = size(read_inputs(fewer, 1, 3, variant="small"), ACCELERATORS["h100"]).stages
        assert [stage.memory.resident["gradients"] for stage in stages] == [4 * own for own in trained]
    recipe.plan_file.rename(recipe.run / "kept.yaml")  # before there is a plan, one is assumed
    for variant, share in (("small", 0.5), ("medium", 0.34)):
        early = size(read_inputs(recipe, 1, 3, variant=variant), ACCELERATORS["h100"])
        assert early.parameters - rest == pytest.approx((1 - share) * 6 * blocks[0], abs=blocks[0] / 2)
    (recipe.run / "kept.yaml").rename(recipe.plan_file)
    printed = command("finetune", path, "--variant", "small", "--dry-run")
    assert "variant small: 3 blocks, 126 k parameters" in printed
    assert not recipe.finetuning("small").path.exists()
