"""Consolidation refuses what it cannot read, and leaves nothing half-written under a final name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ppcl_ds.atomic import atomic_folder, atomic_write
from ppcl_ds.recipe import Recipe
from ppcl_ds.training.checkpoint import Checkpoint, Contents, Piece, SavedUnit
from ppcl_ds.units.plan import UnitPlan
from tests.conftest import command
from tests.export.trained import pretend_trained
from tests.plans import image_spans


@pytest.fixture
def trained(new_run: Callable[..., Path]) -> tuple[Path, Recipe]:
    """A run with a plan and a checkpoint that three ranks have written."""
    path = new_run("qwen")
    return path, pretend_trained(path, "qwen")


def test_a_damaged_file_is_named_and_nothing_is_written(trained: tuple[Path, Recipe]) -> None:
    path, recipe = trained
    file = recipe.distillation.checkpoints / "step-000007" / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    printed = command("consolidate", path, code=2)
    assert "step-000007: rank-00001.safetensors cannot be read" in printed
    assert len(printed.strip().splitlines()) == 1
    assert not list(recipe.run.glob("pruned/*"))


def test_a_checkpoint_without_its_list_is_named(trained: tuple[Path, Recipe]) -> None:
    path, recipe = trained
    (recipe.distillation.checkpoints / "step-000007" / "checkpoint.json").write_text('{"step": 1')
    assert "step-000007: checkpoint.json cannot be read" in command("consolidate", path, code=2)
    (recipe.distillation.checkpoints / "latest").write_text("step-000005")
    assert "step-000005: checkpoint.json cannot be read" in command("consolidate", path, code=2)


def test_foreign_objects_in_a_checkpoint_are_never_unpickled(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    path, recipe = trained
    torch.save(
        {"weight": _Bomb(tmp_path / "ran")}, recipe.distillation.checkpoints / "step-000007" / "rank-00000.safetensors"
    )
    assert "rank-00000.safetensors cannot be read" in command("consolidate", path, code=2)
    assert not (tmp_path / "ran").exists()


def test_a_unit_is_put_together_from_whatever_files_hold_its_parts(trained: tuple[Path, Recipe]) -> None:
    """As three replicas leave it: seven elements, the last part shorter, one file with another unit's part, too."""
    folder = trained[1].distillation.checkpoints / "step-000007"
    parts = {"rank-00000.safetensors": (0, 3), "rank-00002.safetensors": (3, 6), "rank-00007.safetensors": (6, 7)}
    flat = torch.arange(7.0)
    for file, (start, stop) in parts.items():
        save_file({"it/master": flat[start:stop].clone(), "other/master": torch.ones(3)}, folder / file)
    pieces = [Piece(file=file, start=start, stop=stop) for file, (start, stop) in parts.items()]
    unit = SavedUnit(parameters={"weight": [2, 3], "bias": [1]}, pieces=pieces, skipped=0)
    (folder / "checkpoint.json").write_text(Contents(step=1, units={"it": unit}).model_dump_json())
    checkpoint = Checkpoint(folder)
    expected = {"weight": flat[:6].view(2, 3), "bias": flat[6:]}
    torch.testing.assert_close(checkpoint.unit("it"), expected, rtol=0, atol=0)
    for start in range(8):
        for stop in range(start, 8):
            assert torch.equal(checkpoint.part("it", "master", start, stop), flat[start:stop])


def test_a_unit_that_was_not_trained_is_refused(trained: tuple[Path, Recipe]) -> None:
    path, recipe = trained
    other = UnitPlan(name="late", span=(2, 4), streams=("image", "text"))
    image_spans("qwen").model_copy(update={"units": (other,), "variants": {"small": ("late",)}}).save(recipe.plan_file)
    assert "unit 'late' on blocks [2, 4] was not trained" in command("consolidate", path, code=2)


def test_an_interrupted_write_leaves_the_old_content(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", "old")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("old")

    def break_off() -> None:
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "inside").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    with pytest.raises(TypeError):
        atomic_write(tmp_path / "file", 5)  # type: ignore[arg-type]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)
