"""The tests' tiny pipelines hold the tests' transformers, are called as large ones are, and draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from ppcl_ds.data.batch import Size
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.pipeline_check import check
from ppcl_ds.teacher.pipeline_files import open_pipeline
from ppcl_ds.teacher.pipeline_run import RUNGS
from tests.conftest import TEACHERS, WORDS
from tests.families.pipelines import words
from tests.pipelines import OPTIONS, make_pipeline

SIZE = Size(8, 8)
CLASSES = {"flux": diffusers.FluxPipeline, "sd3": diffusers.StableDiffusion3Pipeline}
PACKED = {"qwen", "flux"}
"""Families whose scheduler steps 2 x 2 patches."""
TEXTS: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen": {"encoder_hidden_states": (1, 3, 16)},
    "flux": {"encoder_hidden_states": (1, 4, 16), "pooled_projections": (1, 8), "txt_ids": (4, 3)},
    "sd3": {"encoder_hidden_states": (1, 8 + 4, 16), "pooled_projections": (1, 8)},
}
"""What the transformer reads of "a tiny two"."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> its pipeline folder, made on first use."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            make_pipeline(family, root / family)
        return root / family

    return folder


def steps(family: str, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) as the family's scheduler steps them."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2) if family in PACKED else latents


@pytest.mark.parametrize("family", TEACHERS)
def test_it_is_the_same_whenever_it_is_made(family: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    saved(family)
    words._learnt.cache_clear()  # as in another process
    make_pipeline(family, tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        assert file.read_bytes() == (saved(family) / file.relative_to(tmp_path)).read_bytes(), file


@pytest.mark.parametrize("family", TEACHERS)
def test_the_pipeline_is_its_transformers_caller(family: str, saved: Callable[[str], Path]) -> None:
    call = PipelineCall(saved(family), options=OPTIONS[family], encodes="all")
    prompt = call.encode("a tiny two", SIZE)
    picture = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = steps(family, picture)
    assert call.latents_shape(SIZE) == latents.shape

    arguments = call.arguments(latents, 500, prompt, SIZE)
    assert torch.equal(arguments["hidden_states"], latents)
    assert {key: tuple(arguments[key].shape) for key in TEXTS[family]} == TEXTS[family]

    ladder = call.ladder(SIZE)
    assert len(ladder) == RUNGS
    noise = torch.ones_like(latents)
    assert torch.equal(ladder.target(latents, noise, 500), noise - latents)
    assert torch.allclose(ladder.noisy(latents, noise, 500), latents / 2 + noise / 2, atol=1e-3)

    assert torch.equal(call.to_vae(SIZE)(latents), picture)
    assert torch.equal(call.to_step(SIZE)(latents), latents)
    check(call, prompt, SIZE)


@pytest.mark.parametrize("family", TEACHERS)
def test_each_caption_has_a_prompt_of_its_own(family: str, saved: Callable[[str], Path]) -> None:
    call = PipelineCall(saved(family), options=OPTIONS[family], encodes="all")
    prompts = [call.encode(caption, SIZE).text[0][0] for caption in ["", *(f"a tiny {word}" for word in WORDS)]]
    kept = {tuple(prompt.bfloat16().flatten().tolist()) for prompt in prompts}  # as they are stored
    assert len(kept) == len(prompts)


@pytest.mark.parametrize("family", TEACHERS)
def test_the_pipeline_encodes_and_draws_a_picture(family: str, saved: Callable[[str], Path]) -> None:
    if family == "qwen":  # whose class diffusers has only as code of the folder's own
        pipe = open_pipeline(saved(family), ("vae", "text_encoder", "transformer"))
    else:
        pipe = CLASSES[family].from_pretrained(saved(family), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    [drawn] = pipe("a tiny two", height=8, width=8, num_inference_steps=2, **OPTIONS[family]).images
    assert drawn.size == (8, 8)

    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    pixels = pipe.image_processor.preprocess(Image.fromarray(grey).convert("RGB"))
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    assert latents.shape == (1, 1, 8, 8)
    assert latents.std() > 0.01
    if family == "qwen":
        assert torch.allclose(latents[0, 0], torch.from_numpy(grey) / 127.5 - 1)
