"""`ppcl demo` with the other recipes, shortened: emoji with a text encoder of several files, and captions alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from ppcl_ds.demo.emoji import asked
from ppcl_ds.demo.emoji_judge import judge_file, train
from ppcl_ds.demo.testbeds import TESTBEDS, read_samples
from ppcl_ds.recipe_file import read_recipe_file
from ppcl_ds.shipped import shipped
from tests.conftest import command
from tests.demo.emoji_packages import WIDTH

SHORT = {"log_every": 2, "micro_batch": 4, "micro_batches_per_step": 2}


def shortened(name: str, folder: Path, **config: Any) -> Path:
    """The recipe of that name with few steps, and a teacher of two blocks."""
    recipe = read_recipe_file(shipped(f"recipes/{name}.yaml")).raw
    recipe["run"] = str(folder / "run")
    recipe["demo"] |= {"steps": 4, "batch_size": 8}
    recipe["demo"]["config"] |= {"num_layers": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6], **config}
    recipe["distill"] |= {"steps": 4, "sample_every": 2, "checkpoint_every": 2, **SHORT}
    recipe["finetune"] |= {"variants": ["half"], "steps": 2, "sample_every": 1, "checkpoint_every": 1, **SHORT}
    recipe["plan"]["variants"] = {"half": 0.5}
    for training in ("distill", "finetune"):
        if "trajectories" in recipe[training]:
            recipe[training]["trajectories"]["steps"] = [2, 4]
    recipe["topology"] = {"stages": 1}
    recipe["probe"] = {"batch_size": 4, "batches": 2}
    recipe["evaluate"] |= {"samples": 8, "batch_size": 8, "steps": 2, "velocity_batches": 1}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def check(run: Path) -> None:
    models = {row["name"]: row for row in json.loads((run / "report.json").read_text())["models"]}
    assert set(models) == {"teacher", "half", "half-undistilled", "half-finetuned"}
    for row in models.values():
        assert 0 <= row["accuracy"] <= 1
        assert row["frechet"] > 0
    assert Image.open(run / "samples.png").size[0] > 100


def test_on_emoji(packages: Path, tmp_path: Path) -> None:
    images, captions = read_samples(TESTBEDS["emoji"])
    # What an evaluation would train for a minute, it finds.
    torch.save(train(images, [asked(each) for each in captions], steps=2).state_dict(), judge_file(images, captions))
    path = shortened("emoji", tmp_path, joint_attention_dim=WIDTH)
    command("demo", path)
    check(tmp_path / "run")
    index = json.loads((tmp_path / "run" / "teacher" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "BertModel"]


def test_from_captions_alone(tmp_path: Path) -> None:
    command("demo", shortened("digits_captions", tmp_path))
    check(tmp_path / "run")
    assert not list((tmp_path / "run").glob("images*"))
