"""Broken inputs and full disks: one clear line, and nothing half-written."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import pytest
import torch

from ppcl_ds.atomic import require_space
from ppcl_ds.errors import UserError
from ppcl_ds.export.consolidate import Form, consolidate
from ppcl_ds.recipe import Recipe
from tests.conftest import command, said
from tests.export.trained import pretend_trained
from tests.plans import image_spans


@pytest.fixture
def sharded(new_run: Callable[..., Path]) -> tuple[Path, Recipe, Path]:
    """A run whose teacher is stored in several files: recipe file, recipe, one of the teacher's files."""
    path = new_run("qwen")
    recipe = pretend_trained(path, "qwen")
    folder = recipe.teacher.path / "transformer"
    model = diffusers.QwenImageTransformer2DModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    return path, recipe, shards[1]


def refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(UserError, match=message) as fault:
        consolidate(recipe, [], Form())
    assert "\n" not in str(fault.value)
    assert not list(recipe.run.glob("pruned/*"))


def test_a_missing_shard_of_the_teacher_is_named(sharded: tuple[Path, Recipe, Path]) -> None:
    _, recipe, shard = sharded
    shard.unlink()
    refused(recipe, f"{shard.name} is missing; copy it again")


def test_a_truncated_shard_of_the_teacher_is_named(sharded: tuple[Path, Recipe, Path]) -> None:
    _, recipe, shard = sharded
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(recipe, f"{shard.name} cannot be read")


def test_a_pickle_in_place_of_the_teachers_safetensors_is_not_opened(sharded: tuple[Path, Recipe, Path]) -> None:
    _, recipe, shard = sharded
    torch.save({"weight": torch.ones(2)}, shard)
    refused(recipe, f"{shard.name} cannot be read")


def test_a_plan_of_another_teacher_is_refused(sharded: tuple[Path, Recipe, Path]) -> None:
    path, recipe, _ = sharded
    image_spans("flux").save(recipe.plan_file)
    printed = command("consolidate", path, code=2)
    assert "made for FluxTransformer2DModel with 9 blocks" in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_file_that_cannot_be_written_to_its_end_leaves_nothing(new_run: Callable[..., Path]) -> None:
    """The disk says no in the middle, as a quota would: files may not grow beyond 50 kB."""
    path = new_run("qwen")
    recipe = pretend_trained(path, "qwen")
    done = subprocess.run(
        [sys.executable, "-m", "ppcl_ds.cli", "consolidate", str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "nothing is left of it" in done.stderr
    assert len(said(done.stderr).splitlines()) == 1
    assert not list(recipe.run.glob("pruned/*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs the rights to")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
    new_run: Callable[..., Path], small_disk: Path
) -> None:
    recipe = pretend_trained(new_run("qwen"), "qwen")
    (small_disk / "ballast").write_bytes(bytes(500_000))
    with pytest.raises(UserError, match=r"needs .* GB, but only .* GB are free"):
        consolidate(recipe, ["small"], Form(), out=small_disk / "small")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    new_run: Callable[..., Path], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pretend_trained(new_run("qwen"), "qwen")
    (small_disk / "ballast").write_bytes(bytes(500_000))
    monkeypatch.setattr("ppcl_ds.export.consolidate.require_space", lambda *_: None)  # room there was, when it looked
    with pytest.raises(UserError, match=r"cannot be written .*No space left"):
        consolidate(recipe, ["small"], Form(), out=small_disk / "small")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_room_is_looked_for_on_the_disk_where_the_folder_will_be(tmp_path: Path) -> None:
    require_space(tmp_path / "a" / "b", 1)
    with pytest.raises(UserError, match="make room"):
        require_space(tmp_path / "a" / "b", 10**18)
