"""Qwen-Image from text, with pictures to edit, in layers; Krea 2, Nucleus and JoyImage, alike."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.families.pipelines import family
from tests.families.pipelines.parts import (
    CHANNELS,
    DRAW,
    STATISTICS,
    flow,
    qwen3_processor,
    qwen3_vl,
    qwen_processor,
    qwen_vae,
    qwen_vl,
    source,
    transformer,
    wan_vae,
)
from tests.families.pipelines.words import CAPTION, qwen_tokenizer

_EDIT_HALVINGS = 5
"""Sources are blown up to a million pixels, so their VAE has few latents."""
_EDIT: dict[str, Any] = {"prompt": CAPTION, "height": 128, "width": 128, "image": source(), "true_cfg_scale": 1.0}
_PACKED = {"in_channels": 4 * CHANNELS, "out_channels": CHANNELS}


@family("qwen_image", DRAW | {"true_cfg_scale": 1.0})
def qwen_image() -> Any:
    tokenizer = qwen_tokenizer()
    return diffusers.QwenImagePipeline(
        transformer=transformer("qwen_image", **_PACKED),
        vae=qwen_vae(),
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


@family("qwen_edit", _EDIT, image=True, needs="torchvision")
def qwen_edit() -> Any:
    return diffusers.QwenImageEditPipeline(
        transformer=transformer("qwen_image", **_PACKED), vae=qwen_vae(_EDIT_HALVINGS, width=2), **_edit_parts()
    )


@family("qwen_edit_plus", _EDIT, image=True, needs="torchvision")
def qwen_edit_plus() -> Any:
    return diffusers.QwenImageEditPlusPipeline(
        transformer=transformer("qwen_image_edit_2511", **_PACKED),
        vae=qwen_vae(_EDIT_HALVINGS, width=2),
        **_edit_parts(),
    )


@family(
    "qwen_layered",
    {"prompt": CAPTION, "image": source().convert("RGBA"), "layers": 1, "true_cfg_scale": 1.0},
    image=True,
    needs="torchvision",
)
def qwen_layered() -> Any:
    """Its pictures have a fourth channel, how much one sees of each pixel; with as many, latents pass for pictures."""
    channels = 2 * CHANNELS
    statistics = {name: 2 * values for name, values in STATISTICS.items()}
    return diffusers.QwenImageLayeredPipeline(
        transformer=transformer("qwen_image_layered", in_channels=4 * channels, out_channels=channels),
        vae=qwen_vae(_EDIT_HALVINGS, width=2, input_channels=4, z_dim=channels, **statistics),
        **_edit_parts(),
    )


@family("krea2", DRAW | {"guidance_scale": 0.0, "max_sequence_length": 32})
def krea2() -> Any:
    """Its blocks are told what several layers of the text encoder say."""
    tokenizer = qwen_tokenizer()
    return diffusers.Krea2Pipeline(
        transformer=transformer("krea2", in_channels=4 * CHANNELS),
        vae=qwen_vae(),
        text_encoder=qwen3_vl(tokenizer, whole=False),
        tokenizer=tokenizer,
        scheduler=flow(),
        text_encoder_select_layers=(0, 1, 2),
    )


@family("nucleus", DRAW | {"guidance_scale": 1.0, "max_sequence_length": 64, "return_index": -1})
def nucleus() -> Any:
    """A mixture of experts."""
    tokenizer = qwen_tokenizer()
    return diffusers.NucleusMoEImagePipeline(
        transformer=transformer("nucleus_moe", **_PACKED),
        vae=qwen_vae(),
        text_encoder=qwen3_vl(tokenizer),
        processor=tokenizer,  # the published one reads pictures too and wants torchvision
        scheduler=flow(),
    )


@family(
    "qwen_image_21",
    {"prompt": CAPTION, "height": 64, "width": 64, "use_kv_cache": False},
    needs="torchvision",
)
@family(
    "qwen_image_21_edit",
    {"prompt": CAPTION, "image": source(), "output_resolution": 64, "use_kv_cache": False},
    image=True,
    needs="torchvision",
)
def qwen_image_21() -> Any:
    """Latents are not packed; the pipeline's code says that there are 16 x 16 pixels in each."""
    tokenizer = qwen_tokenizer()
    return diffusers.QwenImage21Pipeline(
        transformer=transformer("qwen_image_21"),
        vae=diffusers.AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=CHANNELS,
            dim_mult=[1] * 5,
            num_res_blocks=1,
            temperal_downsample=[False] * 4,
            **STATISTICS,
        ),
        text_encoder=qwen3_vl(tokenizer),
        processor=qwen3_processor(tokenizer),
        scheduler=flow(),
    )


@family(
    "joyimage",
    {"prompt": CAPTION, "image": source(), "height": 64, "width": 64, "guidance_scale": 1.0},
    image=True,
    needs="torchvision",
)
def joyimage() -> Any:
    """JoyImage-Edit, whose code draws a million pixels."""
    tokenizer = qwen_tokenizer()
    return diffusers.JoyImageEditPipeline(
        transformer=transformer("joyimage_edit"),
        vae=wan_vae(halvings=2, patch_size=8, in_channels=3 * 64, out_channels=3 * 64, scale_factor_spatial=32),
        text_encoder=qwen3_vl(tokenizer),
        tokenizer=tokenizer,
        processor=qwen3_processor(tokenizer),
        scheduler=flow(),
    )


def _edit_parts() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    return {
        "text_encoder": qwen_vl(tokenizer),
        "tokenizer": tokenizer,
        "processor": qwen_processor(tokenizer),
        "scheduler": flow(),
    }
