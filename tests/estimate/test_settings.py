"""What matters is read from the recipe and from the teacher's DeepSpeed file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ppcl_ds.estimate.settings import Settings, settings_of
from ppcl_ds.recipe import load_recipe


def test_a_copy_of_the_teacher_lies_in_a_node_by_default(unprepared: Callable[..., Path]) -> None:
    recipe = load_recipe(unprepared("qwen", teacher={"precision": "bf16"}))
    settings = settings_of(recipe, recipe.distill, gpus_per_node=8)
    assert settings.ranks_per_copy == 8
    assert settings.persistent == 10_000


def test_the_users_own_file_counts(unprepared: Callable[..., Path], tmp_path: Path) -> None:
    zero = {
        "stage": 3,
        "stage3_max_live_parameters": 3e8,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 7,
    }
    (tmp_path / "teacher.json").write_text(json.dumps({"zero_optimization": zero}))
    path = unprepared(
        "qwen",
        teacher={"precision": "bf16", "ranks_per_copy": 2},
        deepspeed={"teacher": str(tmp_path / "teacher.json")},
        distill={"optimizer": {"offload": True}},
    )
    expected = Settings(ranks_per_copy=2, max_live=300_000_000, prefetch=0, persistent=7, offload=True)
    assert settings_of(load_recipe(path), load_recipe(path).distill, gpus_per_node=8) == expected
