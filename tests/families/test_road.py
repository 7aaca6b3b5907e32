"""The whole road on tiny stock pipelines of many families: from images to pipelines that stock diffusers draws with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from data_tools.encode import encode
from data_tools.shard import shard
from ppcl_ds.recipe import load_recipe
from ppcl_ds.watch.tensorboard import read_scalars
from tests.clips import LOSSLESS, noise, write_clip
from tests.conftest import WORDS, command
from tests.families.pipelines import PIPELINES
from tests.families.test_call import made, options_of

ROADS = (
    "qwen_image",
    "qwen_image-captions",
    "qwen_edit",
    "qwen_edit-captions",
    "flux",
    "flux2",
    "flux2-captions",
    "flux_kontext",
    "chroma",
    "z_image",
    "sd3",
    "wan",
    "wan-captions",
    "wan-clips",
    "wan22",
    "wan22-first",
    "ltx",
    "ltx_i2v-clips",
    "ltx_i2v-captions",
    "ltx2",
    "hunyuan_video15",
    "sana",
    "pixart",
    "cogvideox",
)
"""Of every kind that people have: flow, epsilon and v, images, clips of one frame and more, one transformer or two.
Behind the hyphen stands the source, if it is not images."""
IN_THE_ORDINARY_SUITE = {"flux2", "wan22", "pixart"}


def recipe_of(name: str, run: Path, component: str) -> dict[str, Any]:
    name, _, what = name.partition("-")
    call = PIPELINES[name].call
    side = int(call["height"])
    captions = what == "captions"
    size = "x".join(str(call[key]) for key in ("height", "width", "num_frames") if key in call)
    return {
        "run": str(run),
        "data": {
            "source": str(
                run / ("images.tar" if PIPELINES[name].image else "captions.txt") if captions else run / "images"
            ),
            "sizes": {size: 1} if captions else {},
            "shards": "{run}/shards",
            "heldout": 0.25,
            "images": {"size": side, "step": side} | ({"frames": 9} if what == "clips" else {}),
            "workers": 0,
        },
        "teacher": {
            "path": "{run}/teacher",
            "precision": "fp32",
            "component": component,
            "options": options_of(PIPELINES[name]) | ({"image": "source"} if PIPELINES[name].image else {}),
        },
        "probe": {"batch_size": 1, "batches": 4},
        "plan": {"variants": {"small": 0.15 if name == "z_image" else 0.3}, "candidates": ["uniform"], "max_span": 2},
        "topology": {"stages": 1, "replicas": 2},
        "distill": {
            "steps": 2,
            "micro_batch": 1,
            "micro_batches_per_step": 2,
            "optimizer": {"lr": 1e-3},
            "log_every": 1,
            "sample_every": 0 if captions else 2,
        }
        | ({"trajectories": {"steps": [2, 4], "guidance": [1.0, 1.0 if "flux2" in name else 2.0]}} if captions else {}),
        "evaluate": {"samples": 2, "batch_size": 1, "steps": 2, "velocity_batches": 2},
    }


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in IN_THE_ORDINARY_SUITE else pytest.mark.families) for n in ROADS]
)
def test_a_family_goes_from_its_source_to_stock_pipelines(name: str, tmp_path: Path) -> None:
    family, pipe = made(name.partition("-")[0])
    run = tmp_path / "run"
    side = int(family.call["height"])
    (run / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    (run / "captions.txt").write_text("".join(f"a tiny {WORDS[n % 4]}\n" for n in range(12)))
    captions = name.endswith("captions")
    for number in () if captions and not family.image else range(12):
        if name.endswith("clips"):  # of two lengths
            write_clip(run / "images" / f"{number:02d}.mkv", noise((5, 9)[number % 2], side, side, number), **LOSSLESS)
        else:
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(run / "images" / f"{number:02d}{'.source' * captions}.png")
        (run / "images" / f"{number:02d}.txt").write_text(f"a tiny {WORDS[number % 4]}")
    shutil.make_archive(str(run / "images"), "tar", run / "images")
    pipe.save_pretrained(run / "teacher")
    component = "transformer_2" if name == "wan22" else "transformer"
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(name, run, component)))
    recipe = load_recipe(path)
    shard(recipe.data)
    vae = next((run / "teacher" / "vae").glob("*.safetensors"))
    if captions and not family.image:  # it is not read until pictures are asked for
        vae = vae.rename(run / vae.name)
    encode(recipe)
    if captions and family.image:
        vae = vae.rename(run / vae.name)
    if name.endswith("clips"):
        index = json.loads((recipe.data.shards / "encoded" / "index.json").read_text())
        assert len({shape.split("x")[1] for shard in index["shards"] for shape in shard["shapes"]}) == 2
    for step in ("probe", "plan", "distill"):
        command(step, path)
    vae.rename(run / "teacher" / "vae" / vae.name)
    for step in ("consolidate", "evaluate"):
        command(step, path)

    losses = read_scalars(recipe.distillation.board)["run/loss"]
    assert len(losses) == 2
    assert all(np.isfinite(value) for _, value in losses)
    rows = {row["name"]: row for row in json.loads((run / "report.json").read_text())["models"]}
    assert rows["small"]["params"] < rows["teacher"]["params"]
    assert rows["teacher"]["velocity_mse"] == 0 < rows["small"]["velocity_mse"]
    pruned = recipe.pruned("small").parent
    stock = type(pipe).from_pretrained(pruned, trust_remote_code=True)
    own = "Pruned" if name == "chroma" else ""
    assert type(getattr(stock, component)).__name__ == f"{own}{type(getattr(pipe, component)).__name__}"
    assert sum(p.numel() for p in getattr(stock, component).parameters()) == rows["small"]["params"]
    stock.set_progress_bar_config(disable=True)
    drawn = stock(**family.call, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")[0]
    assert bool(torch.as_tensor(drawn).isfinite().all())
    assert isinstance(stock, DiffusionPipeline)
