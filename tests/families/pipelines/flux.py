"""FLUX.1 from text, with a picture to edit, with a picture and a mask to fill, with a picture that guides."""

from __future__ import annotations

from typing import Any

import diffusers
from PIL import Image

from tests.families.pipelines import family
from tests.families.pipelines.parts import CHANNELS, DRAW, SIDE, clip, flow, image_vae, source, t5, transformer
from tests.families.pipelines.words import clip_tokenizer, t5_tokenizer

_DRAW = DRAW | {"max_sequence_length": 32, "guidance_scale": 3.5}
_PACKED = 4 * CHANNELS


@family("flux", _DRAW)
def flux() -> Any:
    return diffusers.FluxPipeline(transformer=transformer("flux", in_channels=_PACKED), **_parts())


@family("flux_kontext", _DRAW | {"image": source(), "max_area": SIDE * SIDE, "_auto_resize": False}, image=True)
def flux_kontext() -> Any:
    return diffusers.FluxKontextPipeline(transformer=transformer("flux", in_channels=_PACKED), **_parts())


@family("flux_fill", _DRAW | {"image": source(), "mask_image": Image.new("L", (SIDE, SIDE), 255)}, image=True)
def flux_fill() -> Any:
    """Latents, those of the picture, and the mask of 2 x 2 pixels a latent."""
    channels = 2 * _PACKED + 4 * 4
    return diffusers.FluxFillPipeline(
        transformer=transformer("flux", in_channels=channels, out_channels=_PACKED), **_parts()
    )


@family("flux_control", _DRAW | {"control_image": source()})
def flux_control() -> Any:
    return diffusers.FluxControlPipeline(
        transformer=transformer("flux", in_channels=2 * _PACKED, out_channels=_PACKED), **_parts()
    )


def _parts() -> dict[str, Any]:
    words, pieces = clip_tokenizer(), t5_tokenizer()
    return {
        "vae": image_vae(),
        "text_encoder": clip(words),
        "tokenizer": words,
        "text_encoder_2": t5(pieces),
        "tokenizer_2": pieces,
        "scheduler": flow(),
    }
