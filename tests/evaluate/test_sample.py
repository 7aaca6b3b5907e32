"""`ppcl sample` draws what the model draws elsewhere: pixel for pixel, and the same for the same seed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import ppcl_ds
from ppcl_ds.data.encoders import TableTextEncoder
from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.sample import as_columns, sample
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.call import caller_for
from ppcl_ds.teacher.sampling import Sampling, draw
from tests.conftest import command
from tests.data.tiny_pipelines import make_pipeline


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=int)


def columns(path: Path, size: int, count: int) -> list[np.ndarray]:
    """The pictures in a file that `ppcl sample` wrote, as small as they were drawn."""
    factor = 128 // size
    with Image.open(path) as page:
        lefts = [number * (size * factor + 8) for number in range(count)]
        parts = [page.crop((left, 0, left + size * factor, size * factor)) for left in lefts]
    return [pixels(part)[::factor, ::factor] for part in parts]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "pipeline"
    make_pipeline("qwen", folder)
    return folder


def test_a_transformer_draws_by_its_recipe(new_run: Callable[..., Path], tmp_path: Path) -> None:
    recipe, out = new_run("qwen"), tmp_path / "new" / "both.png"
    teacher = recipe.parent / "teacher"
    printed = command(
        "sample", teacher, "--recipe", recipe, "--out", out, "--seed", "3", "--guidance", "2",
        "--prompt", "a tiny two", "--prompt", "one",
    )  # fmt: skip
    assert "forwards: 8 of 8" in printed
    assert f"wrote {out}" in printed
    two, one = columns(out, 8, 2)
    sample(teacher, ["one"], load_recipe(recipe), tmp_path / "one.png", seed=3, guidance=2.0)
    assert (columns(tmp_path / "one.png", 8, 1)[0] == one).all()
    model: Any = ppcl_ds.load_model(teacher, torch.float32)
    table = TableTextEncoder(16)
    latents = draw(
        partial(caller_for("QwenImageTransformer2DModel"), model),
        torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3)),
        table.encode(["a tiny two"]),
        table.encode([""]),
        Sampling(steps=2, guidance=2.0),
    )
    expected = ((latents[0, 0].clamp(-1, 1) + 1) * 127.5).numpy()
    assert np.abs(two - expected[..., None]).max() <= 1
    assert (two != one).any()


def test_a_pipeline_draws_as_stock_diffusers_does(pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    arguments = ["--prompt", "a tiny red cat", "--steps", 2, "--size", 16, "--seed", 5]
    assert "steps: 2 of 2" in command("sample", pipeline, *map(str, arguments), "--out", out)
    stock: Any = diffusers.QwenImagePipeline.from_pretrained(pipeline)
    options = {"num_inference_steps": 2, "height": 16, "width": 16}
    expected = stock("a tiny red cat", generator=torch.Generator().manual_seed(5), **options).images[0]
    assert np.abs(columns(out, 16, 1)[0] - pixels(expected)).max() <= 1
    sample(pipeline, ["a dog", "a tiny red cat"], None, tmp_path / "again.png", seed=5, steps=2, size=16)
    assert (columns(tmp_path / "again.png", 16, 2)[1] == columns(out, 16, 1)[0]).all()


def test_guidance_reaches_the_pipeline(pipeline: Path, tmp_path: Path) -> None:
    """Qwen-Image's is unguided unless a negative prompt is given, too."""
    stock: Any = ppcl_ds.load_pipeline(pipeline, torch.float32)
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "true_cfg_scale": 4.0, "negative_prompt": " "}
    expected = stock("a dog", generator=torch.Generator().manual_seed(0), **options).images[0]
    sample(pipeline, ["a dog"], None, tmp_path / "out.png", seed=0, steps=2, size=16, guidance=4.0)
    assert np.abs(columns(tmp_path / "out.png", 16, 1)[0] - pixels(expected)).max() <= 1


def test_a_recipe_may_have_a_vae_and_text_encoders(
    pipeline: Path, new_run: Callable[..., Path], tmp_path: Path
) -> None:
    data = {
        "pipeline": str(pipeline),
        "images": {"encoder": "vae", "size": 16, "step": 4},
        "captions": {"encoder": "pipeline", "width": 16},
    }
    recipe = load_recipe(new_run("qwen", data=data))
    sample(pipeline / "transformer", ["a dog"], recipe, tmp_path / "out.png", seed=0)
    with Image.open(tmp_path / "out.png") as page:
        assert page.width == 128
    with pytest.raises(UserError, match=r"--size 18 is not possible: sides are multiples of data\.images\.step = 4"):
        sample(pipeline / "transformer", ["a dog"], recipe, tmp_path / "out.png", seed=0, size=18)


def test_what_cannot_be_drawn_is_one_line(new_run: Callable[..., Path], pipeline: Path, tmp_path: Path) -> None:
    path = new_run("sd3")
    recipe, teacher, out = load_recipe(path), path.parent / "teacher", tmp_path / "out.png"
    for folder, given, size, words in (
        (tmp_path / "nowhere", None, None, "there is no such folder"),
        (tmp_path, None, None, r"no model_index\.json \(a pipeline\) and no config\.json \(a transformer\)"),
        (teacher, None, None, "give --recipe"),
        (pipeline, recipe, None, "leave it out, or give .*transformer"),
        (pipeline, None, 18, "--size 18 is not possible: .* draws multiples of 4 pixels"),
        (teacher, recipe, 7, "--size 7 is not possible: sides are multiples of"),
        (teacher, recipe, 64, r"--size 64 is not possible: .*cannot be greater than"),
    ):
        with pytest.raises(UserError, match=words) as fault:
            sample(folder, ["a dog"], given, out, seed=0, size=size)
        assert "\n" not in str(fault.value)
    with pytest.raises(UserError, match=r"ends in \.png"):
        sample(pipeline, ["a dog"], None, tmp_path / "out.jpg", seed=0)
    assert not out.exists()
    (teacher / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read"):
        ppcl_ds.load_model(teacher, torch.float32)
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImagePipeline", "_diffusers_version": "0.37.0"}')
    with pytest.raises(UserError, match="cannot be loaded"):
        ppcl_ds.load_pipeline(tmp_path, torch.float32)


def test_large_pictures_keep_their_size_and_long_prompts_their_words(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (300, 200), colour) for colour in ("red", "blue"))
    (tmp_path / "page.png").write_bytes(as_columns([red, blue], ["short", "a long prompt, " * 20]))
    with Image.open(tmp_path / "page.png") as page:
        assert page.width == 608
        assert page.height > 200 + 16 * 7
        assert page.getpixel((299, 199)) == (255, 0, 0)
        assert page.getpixel((308, 0)) == (0, 0, 255)
        assert (pixels(page.crop((308, 208, 608, page.height))) < 100).any()


def test_importing_the_package_stays_cheap() -> None:
    code = "import sys, ppcl_ds; assert 'torch' not in sys.modules; print(ppcl_ds.load_model.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "load_model"
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        _ = ppcl_ds.load_everything
