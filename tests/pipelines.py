"""Tiny whole teachers, one a family: pipeline folders around the transformers of `conftest`, a latent for each pixel.

Captions become prompts of width `WIDTH`, and a pooled one of `POOLED` where the family has it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from ppcl_ds.demo.pipeline import DigitsPipeline, PixelVae, WordTable
from tests.conftest import TEACHERS
from tests.families.pipelines.parts import POOLED, WIDTH, clip, flow, image_vae, t5
from tests.families.pipelines.words import clip_tokenizer, t5_tokenizer

CLIP_TOKENS = 8
"""Of every caption, where CLIP reads it; the tests' captions have five at most, their ends included."""
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen": {},
    "flux": {"max_sequence_length": 4},
    "sd3": {"max_sequence_length": 4},
}
"""What a draw has to be told: T5 would read 512 or 256 tokens."""


def make_pipeline(family: str, folder: Path) -> None:
    """Save the pipeline of "qwen", "flux" or "sd3" as its users find it.

    Pictures of 8 x 8 pixels have latents (1, 8, 8): qwen's are the pixels, grey; the others' are what a random VAE
    makes of RGB. qwen's captions have a mask and their own length, the others' `OPTIONS` and `CLIP_TOKENS` tokens.
    """
    make(family).save_pretrained(folder)


def make(family: str) -> Any:
    """The same pipeline, in memory."""
    class_name, config = TEACHERS[family]
    torch.manual_seed(0)
    transformer = getattr(diffusers, class_name)(**config)
    pipeline_class, parts = _FAMILIES[family]
    return pipeline_class(transformer=transformer, scheduler=flow(), **parts())


def _qwen() -> dict[str, Any]:
    return {"vae": PixelVae(1), "text_encoder": WordTable(WIDTH)}


def _flux() -> dict[str, Any]:
    words, pieces = _clip_tokenizer(), t5_tokenizer()
    return {
        "vae": _vae(),
        "text_encoder": clip(words),
        "tokenizer": words,
        "text_encoder_2": t5(pieces),
        "tokenizer_2": pieces,
    }


def _sd3() -> dict[str, Any]:
    """Its two CLIPs' embeddings stand side by side, and so do their pooled ones; T5's tokens follow."""
    words, pieces = _clip_tokenizer(), t5_tokenizer()
    return {
        "vae": _vae(),
        "text_encoder": clip(words, projection=POOLED // 2),
        "tokenizer": words,
        "text_encoder_2": clip(words, projection=POOLED // 2),
        "tokenizer_2": _clip_tokenizer(),
        "text_encoder_3": t5(pieces),
        "tokenizer_3": pieces,
    }


_FAMILIES: dict[str, tuple[Any, Callable[[], dict[str, Any]]]] = {
    "qwen": (DigitsPipeline, _qwen),
    "flux": (diffusers.FluxPipeline, _flux),
    "sd3": (diffusers.StableDiffusion3Pipeline, _sd3),
}


def _clip_tokenizer() -> Any:
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def _vae() -> Any:
    """A latent for each pixel, of one channel."""
    return image_vae(0, latent_channels=1, scaling_factor=1.0, shift_factor=0.0, mid_block_add_attention=False)
