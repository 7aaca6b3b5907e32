"""Make the archive of a release for `test_old_runs.py`: `python -m tests.old_runs.make VERSION`, with its code."""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import yaml
from PIL import Image

from data_tools.encode import encode
from data_tools.shard import shard
from ppcl_ds.recipe import load_recipe
from ppcl_ds.units.plan import Plan, UnitPlan
from tests.conftest import TEACHERS, WORDS, command, make_recipe, make_teacher

UNITS = (
    UnitPlan(name="early", span=(0, 1), streams=("image", "text")),
    UnitPlan(name="group", kind="text", span=(2, 3), streams=("text",)),
    UnitPlan(name="line", kind="ffn", span=(4, 4), streams=("image",)),
    UnitPlan(name="thin", kind="ffn", span=(5, 5), streams=("image",), keep=0.25),
)


def make(archive: Path) -> None:
    """Two of four steps of a tiny distillation, with its shards and its teacher."""
    run = Path("run")
    (run / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(64):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(run / "images" / f"{number:03d}.png")
        (run / "images" / f"{number:03d}.txt").write_text(f"a tiny {WORDS[number % 4]}")
    class_name, config = TEACHERS["qwen"]
    make_teacher("qwen", run / "teacher")
    torch.manual_seed(0)
    narrow = getattr(diffusers, class_name)(**config | {"num_attention_heads": 1})
    narrow.save_pretrained(run / "teacher" / "transformer")
    recipe = make_recipe("qwen", run)
    recipe["distill"] |= {"steps": 4, "keep_checkpoints": 1, "calibration_steps": 2}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(Path("recipe.yaml"))
    shard(loaded.data)
    encode(loaded)
    variants = {"small": ("early",), "mixed": tuple(unit.name for unit in UNITS)}
    Plan(teacher=class_name, blocks=6, units=UNITS, variants=variants).save(loaded.plan_file)
    command("distill", "recipe.yaml", "--until", "2")
    left_out = ("run/images", "run/shards/raw", "run/distill/tensorboard")
    with tarfile.open(archive, "w:xz") as out:
        for part in ("recipe.yaml", "run"):
            out.add(part, filter=lambda member: None if member.name.startswith(left_out) else member)


if __name__ == "__main__":
    archive = Path(__file__).parent / f"{sys.argv[1]}.tar.xz"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make(archive)
    print(f"wrote {archive}")
