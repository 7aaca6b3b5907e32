"""A teacher in CPU memory says what it says on the accelerator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ppcl_ds.errors import UserError
from ppcl_ds.recipe import load_recipe, teacher_config
from ppcl_ds.watch.tensorboard import read_scalars
from tests.conftest import command
from tests.plans import three_spans


def test_units_learn_the_same_from_it(new_run: Callable[..., Path]) -> None:
    """On two ranks; where there is no accelerator, only the road there differs."""
    curves = []
    for offload in (None, "cpu"):
        path = new_run("qwen", distill={"steps": 2, "log_every": 1}, teacher={"offload": offload})
        recipe = load_recipe(path)
        three_spans().save(recipe.plan_file)
        command("distill", path)
        scalars = read_scalars(recipe.distillation.board)
        curves.append({name: points for name, points in scalars.items() if "/loss/" in name})
    assert len(curves[0]) == 5
    assert curves[0] == curves[1]


def test_it_is_not_on_the_accelerator_as_well(new_run: Callable[..., Path]) -> None:
    recipe = load_recipe(new_run("qwen", teacher={"offload": "cpu", "ranks_per_copy": 1}))
    with pytest.raises(UserError, match=r"ranks_per_copy: 1 .* leave one of them out"):
        teacher_config(recipe)


def test_a_file_that_says_nothing_of_zero_is_one_line(new_run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "teacher.json").write_text('{"train_micro_batch_size_per_gpu": 1}')
    recipe = load_recipe(new_run("qwen"))
    own = recipe.deepspeed.model_copy(update={"teacher": tmp_path / "teacher.json"})
    recipe = recipe.model_copy(update={"deepspeed": own})
    with pytest.raises(UserError, match="it has no zero_optimization"):
        teacher_config(recipe)
