"""A run that an earlier release began goes on and is consolidated; `old_runs/` has one such run a release."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import diffusers
import pytest
import torch

from ppcl_ds.recipe import load_recipe
from ppcl_ds.training.checkpoint import newest_checkpoint
from tests.conftest import command

RUNS = sorted((Path(__file__).parent / "old_runs").glob("*.tar.xz"))
"""Each with `recipe.yaml`, whose run folder is `run`: two of four steps distilled on two stages, one replica; a depth,
a text and two feed-forward units. The teacher and the encoded shards are with it."""


@pytest.mark.parametrize("archive", RUNS, ids=lambda archive: archive.name.removesuffix(".tar.xz"))
def test_it_goes_on_and_is_consolidated(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
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
    model = diffusers.QwenImageTransformer2DModel.from_pretrained(recipe.pruned("small"))
    assert len(model.transformer_blocks) == 5
    block = {name: tensor.float() for name, tensor in model.transformer_blocks[0].state_dict().items()}
    torch.testing.assert_close(block, dict(resumed.unit("early")), rtol=0, atol=0)
    assert (recipe.pruned("mixed") / "modeling_pruned.py").exists()
