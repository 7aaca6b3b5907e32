"""Families built as FLUX.1 is, of double and single blocks: Chroma, Bria and FIBO, Ovis, LongCat, HunyuanImage."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import transformers

from tests.families.pipelines import family
from tests.families.pipelines.parts import (
    CHANNELS,
    DRAW,
    SCALE,
    WIDTH,
    decoder_size,
    flow,
    image_vae,
    qwen3,
    qwen_processor,
    qwen_vl,
    source,
    t5,
    transformer,
    wan_vae,
)
from tests.families.pipelines.words import CAPTION, qwen_tokenizer, t5_tokenizer

_DRAW = DRAW | {"guidance_scale": 1.0}
_PACKED = 4 * CHANNELS


@family("chroma", _DRAW | {"max_sequence_length": 32})
def chroma() -> Any:
    tokenizer = t5_tokenizer()
    return diffusers.ChromaPipeline(
        transformer=transformer("chroma", in_channels=_PACKED),
        vae=image_vae(),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


@family("bria", _DRAW | {"max_sequence_length": 32})
def bria() -> Any:
    tokenizer = t5_tokenizer()
    return diffusers.BriaPipeline(
        transformer=transformer("bria", in_channels=_PACKED),
        vae=image_vae(),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


@family("bria_fibo", {"prompt": CAPTION, "height": 64, "width": 64, "guidance_scale": 1.0})
def bria_fibo() -> Any:
    """Each block is told what a layer of the text encoder says; its VAE has 16 x 16 pixels a latent."""
    return diffusers.BriaFiboPipeline(**_fibo())


@family(
    "bria_fibo_edit",
    {
        "prompt": json.dumps({"edit_instruction": CAPTION}),
        "image": source(64),
        "height": 64,
        "width": 64,
        "_auto_resize": False,
        "guidance_scale": 1.0,
    },
    image=True,
)
def bria_fibo_edit() -> Any:
    return diffusers.BriaFiboEditPipeline(**_fibo())


def _fibo() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    config = transformers.SmolLM3Config(**decoder_size(tokenizer, width=WIDTH // 2, layers=6))
    return {
        "transformer": transformer("bria_fibo"),
        "vae": wan_vae(halvings=4),
        "text_encoder": transformers.SmolLM3ForCausalLM(config),
        "tokenizer": tokenizer,
        "scheduler": flow(),
    }


@family("ovis", _DRAW | {"max_sequence_length": 32})
def ovis() -> Any:
    tokenizer = qwen_tokenizer()
    return diffusers.OvisImagePipeline(
        transformer=diffusers.OvisImageTransformer2DModel(
            in_channels=_PACKED,
            out_channels=_PACKED,
            num_layers=4,
            num_single_layers=5,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=image_vae(),
        text_encoder=qwen3(tokenizer),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


@family("longcat_image", _DRAW | {"enable_prompt_rewrite": False})
def longcat_image() -> Any:
    """The pipeline's code says that there are 16 latent channels."""
    tokenizer = qwen_tokenizer()
    return diffusers.LongCatImagePipeline(
        transformer=transformer("longcat_image", in_channels=4 * 16),
        vae=image_vae(latent_channels=16),
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
        text_processor=tokenizer,  # read where prompts are rewritten; the published one wants torchvision
        scheduler=flow(),
    )


@family(
    "longcat_image_edit", {"prompt": CAPTION, "image": source(), "guidance_scale": 1.0}, image=True, needs="torchvision"
)
def longcat_image_edit() -> Any:
    """The pipeline's code blows sources up to a million pixels, so their VAE has few latents."""
    tokenizer = qwen_tokenizer()
    return diffusers.LongCatImageEditPipeline(
        transformer=transformer("longcat_image", in_channels=4 * 16),
        vae=image_vae(
            halvings=5,
            latent_channels=16,
            block_out_channels=[4] * 6,
            layers_per_block=1,
            mid_block_add_attention=False,
        ),
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
        text_processor=qwen_processor(tokenizer),
        scheduler=flow(),
    )


@family("hunyuan_image", DRAW)
def hunyuan_image() -> Any:
    """Its guidance is a part of the pipeline, here one that is off."""
    tokenizer, letters = qwen_tokenizer(), transformers.ByT5Tokenizer()
    return diffusers.HunyuanImagePipeline(
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=4,
            num_single_layers=5,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            rope_axes_dim=(8, 8),
        ),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=CHANNELS,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=SCALE,
            sample_size=16,
            scaling_factor=0.47,
        ),
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(letters),
        tokenizer_2=letters,
        guider=diffusers.AdaptiveProjectedMixGuidance(enabled=False),
        ocr_guider=diffusers.AdaptiveProjectedMixGuidance(enabled=False),
        scheduler=flow(),
    )
