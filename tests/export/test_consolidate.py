"""Consolidation refuses what it cannot read, and leaves nothing half-written under a final name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppcl_ds.planning.plan import Plan, UnitPlan
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.whole import whole_folder, write_whole
from tests.conftest import command

UNIT = UnitPlan(name="early", span=(0, 2), streams=("image", "text"))
PLAN = Plan(teacher="QwenImageTransformer2DModel", blocks=6, units=(UNIT,), variants={"small": ("early",)})


@pytest.fixture
def trained(new_run: Callable[..., Path]) -> tuple[Path, Recipe]:
    """A run with a plan and a checkpoint whose unit is the teacher's own first block."""
    path = new_run("qwen")
    recipe = load_recipe(path)
    PLAN.save(recipe.plan_file)
    PLAN.save(recipe.trained_plan)
    checkpoint = recipe.checkpoints / "step-000001"
    checkpoint.mkdir(parents=True)
    (recipe.checkpoints / "latest").write_text(checkpoint.name)
    (checkpoint / "layer_00-model_states.pt").write_bytes(b"PK\x03\x04 cut short")
    return path, recipe


def test_a_damaged_unit_is_named_and_nothing_is_written(trained: tuple[Path, Recipe]) -> None:
    path, recipe = trained
    printed = command("consolidate", path, code=2)
    assert "unit 'early'" in printed
    assert "layer_00-model_states.pt" in printed
    assert not recipe.pruned("small").exists()


def test_foreign_objects_in_a_checkpoint_are_never_unpickled(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    path, recipe = trained
    torch.save({"weight": _Bomb(tmp_path / "ran")}, recipe.checkpoints / "step-000001" / "layer_00-model_states.pt")
    assert "unit 'early'" in command("consolidate", path, code=2)
    assert not (tmp_path / "ran").exists()


def test_a_unit_that_was_not_trained_is_refused(trained: tuple[Path, Recipe]) -> None:
    path, recipe = trained
    other = UnitPlan(name="late", span=(3, 4), streams=("image", "text"))
    PLAN.model_copy(update={"units": (other,), "variants": {"small": ("late",)}}).save(recipe.plan_file)
    assert "unit 'late' on blocks [3, 4] was not trained" in command("consolidate", path, code=2)


def test_an_interrupted_write_leaves_the_old_content(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "old")
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("old")

    def break_off() -> None:
        with whole_folder(tmp_path / "folder") as folder:
            (folder / "inside").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    with pytest.raises(TypeError):
        write_whole(tmp_path / "file", 5)  # type: ignore[arg-type]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "old"


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)
