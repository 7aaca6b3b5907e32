"""`ppcl sample` draws what the model draws elsewhere: pixel for pixel, and the same for the same seed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import ppcl_ds
from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.sample import as_columns, sample
from tests.clips import long_enough
from tests.conftest import command
from tests.families.test_call import made
from tests.pipelines import make, make_pipeline


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
    folder = tmp_path_factory.mktemp("flux") / "pipeline"
    make_pipeline("flux", folder)
    return folder


def test_the_digits_draw_as_their_pipeline_does(tmp_path: Path) -> None:
    """Theirs tells nobody of its steps."""
    make_pipeline("qwen", tmp_path / "pipeline")
    out = tmp_path / "new" / "both.png"
    arguments = ["--prompt", "a tiny two", "--prompt", "one", "--steps", "2", "--seed", "3", "--guidance", "2"]
    printed = command("sample", tmp_path / "pipeline", *arguments, "--out", out)
    assert "steps: 4 of 4" in printed
    assert f"wrote {out}" in printed
    own: Any = make("qwen")
    options = {"num_inference_steps": 2, "true_cfg_scale": 2.0}
    for caption, found in zip(("a tiny two", "one"), columns(out, 8, 2), strict=True):
        expected = own(caption, generator=torch.Generator().manual_seed(3), **options).images[0]
        assert np.abs(found - pixels(expected)).max() <= 1


def test_a_pipeline_draws_as_stock_diffusers_does(pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    arguments = ["--prompt", "a tiny red cat", "--steps", 2, "--size", 16, "--seed", 5]
    assert "steps: 2 of 2" in command("sample", pipeline, *map(str, arguments), "--out", out)
    stock: Any = diffusers.FluxPipeline.from_pretrained(pipeline)
    options = {"num_inference_steps": 2, "height": 16, "width": 16}
    expected = stock("a tiny red cat", generator=torch.Generator().manual_seed(5), **options).images[0]
    assert np.abs(columns(out, 16, 1)[0] - pixels(expected)).max() <= 1
    sample(pipeline, ["a dog", "a tiny red cat"], tmp_path / "again.png", seed=5, steps=2, size=16)
    assert (columns(tmp_path / "again.png", 16, 2)[1] == columns(out, 16, 1)[0]).all()


def test_of_a_clip_the_frame_in_its_middle_is_drawn(tmp_path: Path) -> None:
    _, wan = made("wan")
    long_enough(wan)
    wan.save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "out.png"
    arguments = ["--prompt", "a tiny red cat", "--steps", "1", "--guidance", "1", "--size", "16", "--seed", "3"]
    command("sample", tmp_path / "pipeline", *arguments, "--out", out)
    options = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pil"}
    frames = wan("a tiny red cat", generator=torch.Generator().manual_seed(3), **options).frames[0]
    [found] = columns(out, 16, 1)
    assert len(frames) == 81
    assert np.abs(found - pixels(frames[40])).max() <= 1
    assert np.abs(found - pixels(frames[0])).max() > 1


def test_guidance_reaches_the_pipeline(pipeline: Path, tmp_path: Path) -> None:
    """FLUX's is unguided unless a negative prompt is given, too."""
    stock: Any = ppcl_ds.load_pipeline(pipeline, torch.float32)
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "true_cfg_scale": 4.0, "negative_prompt": " "}
    expected = stock("a dog", generator=torch.Generator().manual_seed(0), **options).images[0]
    sample(pipeline, ["a dog"], tmp_path / "out.png", seed=0, steps=2, size=16, guidance=4.0)
    assert np.abs(columns(tmp_path / "out.png", 16, 1)[0] - pixels(expected)).max() <= 1


def test_folders_may_be_strings_of_ones_home(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pipeline.parent))
    loaded = ppcl_ds.load_pipeline(f"~/{pipeline.name}")
    assert type(loaded) is diffusers.FluxPipeline
    model, stock = (
        ppcl_ds.load_model(f"{pipeline}/transformer"),
        diffusers.FluxTransformer2DModel.from_pretrained(pipeline / "transformer", torch_dtype=torch.bfloat16),
    )
    for (name, found), expected in zip(model.state_dict().items(), stock.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    with pytest.raises(UserError, match="nowhere"):
        ppcl_ds.load_model("nowhere")


def test_what_cannot_be_drawn_is_one_line(pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    for folder, size, words in (
        (tmp_path / "nowhere", None, "there is no such folder"),
        (tmp_path, None, r"no model_index\.json in it; give a pipeline folder"),
        (pipeline / "transformer", None, r"no model_index\.json in it; give a pipeline folder"),
        (pipeline, 17, "--size 17 is not possible: .* draws multiples of 2 pixels"),
    ):
        with pytest.raises(UserError, match=words) as fault:
            sample(folder, ["a dog"], out, seed=0, size=size)
        assert "\n" not in str(fault.value)
    with pytest.raises(UserError, match=r"ends in \.png"):
        sample(pipeline, ["a dog"], tmp_path / "out.jpg", seed=0)
    assert not out.exists()
    shutil.copytree(pipeline / "transformer", tmp_path / "torn")
    (tmp_path / "torn" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read"):
        ppcl_ds.load_model(str(tmp_path / "torn"))
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
