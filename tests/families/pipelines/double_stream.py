"""SD3, AuraFlow, HiDream, CogView3-Plus and CogView4: pictures of latents with text beside them in each block."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.families.pipelines import family
from tests.families.pipelines.parts import (
    CHANNELS,
    DRAW,
    POOLED,
    WIDTH,
    clip,
    decoder_size,
    flow,
    image_vae,
    llama,
    t5,
    transformer,
    umt5,
)
from tests.families.pipelines.words import clip_tokenizer, llama_tokenizer, qwen_tokenizer, t5_tokenizer

_DRAW = DRAW | {"guidance_scale": 1.0, "max_sequence_length": 32}


@family("sd3", _DRAW)
def sd3() -> Any:
    """Its two pooled embeddings are joined."""
    words, pieces = clip_tokenizer(), t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer("sd35_medium"),
        vae=image_vae(),
        text_encoder=clip(words, projection=POOLED // 2),
        tokenizer=words,
        text_encoder_2=clip(words, projection=POOLED // 2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(pieces),
        tokenizer_3=pieces,
        scheduler=flow(),
    )


@family("auraflow", _DRAW)
def auraflow() -> Any:
    tokenizer = t5_tokenizer()
    return diffusers.AuraFlowPipeline(
        transformer=transformer("auraflow"),
        vae=image_vae(),
        text_encoder=umt5(tokenizer),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


@family("hidream", _DRAW)
def hidream() -> Any:
    """Each block is told what a layer of Llama says. The pipeline's code draws 128 x 128 latents: in large patches."""
    words, pieces, pairs = clip_tokenizer(), t5_tokenizer(), llama_tokenizer()
    return diffusers.HiDreamImagePipeline(
        transformer=transformer("hidream", patch_size=4),
        vae=image_vae(),
        text_encoder=clip(words, projection=POOLED // 2),
        tokenizer=words,
        text_encoder_2=clip(words, projection=POOLED // 2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(pieces),
        tokenizer_3=pieces,
        text_encoder_4=llama(pairs, width=8, layers=4),
        tokenizer_4=pairs,
        scheduler=flow(),
    )


@family("cogview4", _DRAW)
def cogview4() -> Any:
    tokenizer = qwen_tokenizer()
    return diffusers.CogView4Pipeline(
        transformer=transformer("cogview4"),
        vae=image_vae(),
        text_encoder=transformers.GlmForCausalLM(transformers.GlmConfig(**decoder_size(tokenizer))),
        tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
    )


@family("cogview3plus", _DRAW)
def cogview3plus() -> Any:
    tokenizer = t5_tokenizer()
    return diffusers.CogView3PlusPipeline(
        transformer=diffusers.CogView3PlusTransformer2DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=5,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=16,
            sample_size=8,
        ),
        vae=image_vae(shift_factor=None),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        scheduler=diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    )
