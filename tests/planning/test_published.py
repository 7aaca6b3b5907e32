"""The published choice for Qwen-Image loads for that teacher, and gives up what it is said to give up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights

from ppcl_ds.planning.budget import budget_of
from ppcl_ds.planning.choose import make_plan, width_candidates
from ppcl_ds.planning.error_model import unknown
from ppcl_ds.planning.show import lines_of
from ppcl_ds.sections import Plan
from ppcl_ds.shipped import shipped
from ppcl_ds.teacher.files import empty_model
from ppcl_ds.teacher.modeling_pruned import PrunedQwenImageTransformer2DModel
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.kinds import parameters_saved
from ppcl_ds.units.plan import load_plan
from tests.conftest import command

PUBLISHED = shipped("plans/qwen_image_published.yaml")


def run(model: Any) -> None:
    """Call it on the least that it reads."""
    config = model.config
    model(
        hidden_states=torch.zeros(1, 4, config.in_channels),
        encoder_hidden_states=torch.zeros(1, 2, config.joint_attention_dim),
        timestep=torch.ones(1),
        img_shapes=[[(1, 2, 2)]],
    )


@pytest.fixture(scope="module")
def qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """Qwen-Image by its configuration, which is the class's default."""
    folder = tmp_path_factory.mktemp("qwen-image")
    with init_empty_weights():
        config = diffusers.QwenImageTransformer2DModel().config
    (folder / "config.json").write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel", **config}))
    return Teacher(folder, weights=False, run=run)


def test_it_fits_qwen_image_and_takes_25_of_60_blocks_out(qwen_image: Teacher) -> None:
    blocks = qwen_image.blocks
    plan = load_plan(PUBLISHED, qwen_image)
    assert len(blocks) == 60
    assert {variant: len(plan.places(variant)) for variant in plan.variants} == {"depth": 35, "depth-and-width": 35}
    assert [unit.span for unit in plan.units if unit.kind == "depth"][4] == (15, 24)
    whole = sum(p.numel() for p in qwen_image.empty.parameters())
    left = {v: whole - sum(parameters_saved(u, qwen_image) for u in plan.units_of(v)) for v in plan.variants}
    assert whole == 20_430_401_088
    assert left["depth"] == whole - 25 * blocks[0].parameters

    renumbered = {origin: place for place, (origin, _) in enumerate(plan.places("depth-and-width"))}
    block = "transformer_blocks.{}".format
    config = {key: value for key, value in qwen_image.files.config.items() if key != "_class_name"} | {"num_layers": 35}
    with init_empty_weights():
        model = PrunedQwenImageTransformer2DModel(
            **config,
            linear_text=[block(renumbered[k]) for k in (37, 41, 51, 59)],
            text_jumps=[block(renumbered[k]) for k in (37, 41, 51)],
            narrow_ffn={f"{block(renumbered[k])}.img_mlp": 0 for k in (2, 58, 59)}
            | {f"{block(renumbered[k])}.txt_mlp": 0 for k in (2, 58)},
        )
    assert left["depth-and-width"] == sum(p.numel() for p in model.parameters())


def test_a_plan_that_is_given_needs_no_probe(new_run: Callable[..., Path], tmp_path: Path) -> None:
    given = tmp_path / "given.yaml"
    given.write_text(
        "teacher: QwenImageTransformer2DModel\nblocks: 6\nunits:\n  - {name: a, span: [1, 2], streams: [image, text]}\n"
        "variants:\n  only: [a]\n"
    )
    path = new_run("qwen", plan={"rule": "given", "given": str(given), "variants": {}, "width": ["text", "ffn"]})
    printed = command("plan", path)
    assert "only" in printed
    assert "not known" in printed, "nobody has probed"
    assert "17 units for 1 variants" in printed  # the span, 5 text groups, 6 image and 5 text feed-forwards
    assert "is in order" in command("plan", path, "--check")


def test_planning_with_every_width_unit_builds_no_empty_teacher_a_candidate(
    qwen_image: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def counted(config: dict[str, Any]) -> Any:
        built.append(config["_class_name"])
        return empty_model(config)

    monkeypatch.setattr("ppcl_ds.teacher.files.empty_model", counted)
    teacher = Teacher(qwen_image.files.folder, weights=False, run=run)
    section = Plan(rule="given", given=PUBLISHED, width=("text", "ffn", "narrow"))
    budget = budget_of(section, teacher, torch.bfloat16)
    plan = make_plan(section, 0, None, teacher, budget)
    assert len(width_candidates(section, teacher)) == 238
    budget = budget_of(section, teacher, torch.bfloat16, plan.units)
    assert len(budget.parts) > 200
    nothing = unknown()
    assert len(lines_of(plan, teacher, nothing, budget)) == 2
    assert len(built) < 12, "the teacher, one for each key that might be a length, one for each variant"
