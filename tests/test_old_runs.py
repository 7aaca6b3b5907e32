"""A run that an earlier release began goes on and is consolidated; `old_runs/` has one such run a release."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml

from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.training.checkpoint import newest_checkpoint
from tests.conftest import command
from tests.pipelines import make

FIRST = Path(__file__).parent / "old_runs" / "0.1.0.tar.xz"
"""Its teacher is a transformer alone, and its shards were encoded by what is gone."""
RUNS = sorted(set(FIRST.parent.glob("*.tar.xz")) - {FIRST})
"""Each with `recipe.yaml`, whose run folder is `run`: two of four steps distilled on two stages, one replica; a depth,
a text and two feed-forward units. The teacher and the encoded shards are with it."""


def opened(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")


def test_a_run_of_the_first_release_says_what_it_lacks_and_is_consolidated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads what is said line by line ends with a variant; training goes on with none but its own release."""
    monkeypatch.chdir(tmp_path)
    opened(FIRST, tmp_path)
    said = command("consolidate", "recipe.yaml", code=2)
    gone = [("data", "captions"), ("data", "images", "channels"), ("data", "images", "encoder")]
    for key in map(".".join, gone):
        assert f"key '{key}'" in said
    raw = yaml.safe_load(Path("recipe.yaml").read_text())
    del raw["data"]["captions"], raw["data"]["images"]["channels"], raw["data"]["images"]["encoder"]
    Path("recipe.yaml").write_text(yaml.safe_dump(raw))
    said += command("consolidate", "recipe.yaml", code=2)
    assert "teacher: no readable model_index.json; give a diffusers pipeline folder" in said

    transformer = diffusers.QwenImageTransformer2DModel.from_pretrained("run/teacher")
    shutil.rmtree("run/teacher")
    pipeline: Any = make("qwen")
    pipeline.transformer = transformer
    pipeline.save_pretrained("run/teacher")
    said += command("distill", "recipe.yaml", code=2)
    assert "ppcl-data encode" in said
    assert len(said.splitlines()) == 3  # a line each

    command("consolidate", "recipe.yaml")
    expect_units(load_recipe(Path("recipe.yaml")))


@pytest.mark.parametrize("archive", RUNS, ids=lambda archive: archive.name.removesuffix(".tar.xz"))
def test_it_goes_on_and_is_consolidated(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    opened(archive, tmp_path)
    recipe = load_recipe(Path("recipe.yaml"))
    shutil.copytree(recipe.run, "fresh", ignore=shutil.ignore_patterns("distill"))
    Path("fresh.yaml").write_text(Path("recipe.yaml").read_text().replace("run: run\n", "run: fresh\n"))
    fresh = load_recipe(Path("fresh.yaml"))
    assert newest_checkpoint(recipe.distillation.checkpoints).contents.step == 2

    command("distill", "recipe.yaml")
    command("distill", "fresh.yaml")
    resumed, whole = (newest_checkpoint(each.distillation.checkpoints) for each in (recipe, fresh))
    assert resumed.contents.step == whole.contents.step == 4
    assert resumed.contents.units.keys() == whole.contents.units.keys() == {"early", "group", "line", "thin"}
    for name in whole.contents.units:
        for what in ("master", "exp_avg", "exp_avg_sq"):  # two machines round differently
            torch.testing.assert_close(resumed.unit(name, what), whole.unit(name, what), rtol=1e-3, atol=1e-6)

    command("consolidate", "recipe.yaml")
    expect_units(recipe)


def expect_units(recipe: Recipe) -> None:
    """Both variants are there, with the units of the newest checkpoint."""
    trained = newest_checkpoint(recipe.distillation.checkpoints)
    model = diffusers.QwenImageTransformer2DModel.from_pretrained(recipe.pruned("small"))
    assert len(model.transformer_blocks) == 5
    block = {name: tensor.float() for name, tensor in model.transformer_blocks[0].state_dict().items()}
    torch.testing.assert_close(block, dict(trained.unit("early")), rtol=0, atol=0)
    assert (recipe.pruned("mixed") / "modeling_pruned.py").exists()
