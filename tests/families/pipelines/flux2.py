"""FLUX.2 and its small ones without embedded guidance; ERNIE-Image, which shares their VAE."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.families.pipelines import family
from tests.families.pipelines.parts import CHANNELS, DRAW, WIDTH, flow, flux2_vae, mistral3, qwen3, source, transformer
from tests.families.pipelines.words import qwen_tokenizer

_LAYERS = (1, 2)
"""Of the text encoder, whose outputs are joined."""
_DRAW = DRAW | {"max_sequence_length": 32, "text_encoder_out_layers": _LAYERS}
_CHANGES = {"in_channels": 4 * CHANNELS, "joint_attention_dim": len(_LAYERS) * WIDTH}


@family("flux2", _DRAW | {"guidance_scale": 3.5})
@family("flux2_edit", _DRAW | {"guidance_scale": 3.5, "image": source(64)}, image=True)
def flux2() -> Any:
    tokenizer = qwen_tokenizer()
    return diffusers.Flux2Pipeline(
        transformer=transformer("flux2", **_CHANGES),
        vae=flux2_vae(),
        text_encoder=mistral3(tokenizer),
        tokenizer=tokenizer,  # a processor, which wants torchvision, where pictures are read
        scheduler=flow(),
    )


@family("flux2_klein", _DRAW | {"guidance_scale": 1.0})
@family("flux2_klein_edit", _DRAW | {"guidance_scale": 1.0, "image": source(64)}, image=True)
def flux2_klein() -> Any:
    tokenizer = qwen_tokenizer()
    return diffusers.Flux2KleinPipeline(
        transformer=transformer("flux2_klein", **_CHANGES),
        vae=flux2_vae(),
        text_encoder=qwen3(tokenizer, causal=True),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


@family("ernie_image", DRAW | {"guidance_scale": 1.0, "use_pe": False})
def ernie_image() -> Any:
    """Without the language model that rewrites prompts."""
    tokenizer = qwen_tokenizer()
    return diffusers.ErnieImagePipeline(
        transformer=transformer("ernie_image", in_channels=4 * CHANNELS, out_channels=4 * CHANNELS),
        vae=flux2_vae(),
        text_encoder=mistral3(tokenizer, whole=False),
        tokenizer=tokenizer,
        scheduler=flow(),
    )
