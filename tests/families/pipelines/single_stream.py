"""Z-Image, Lumina, OmniGen, PRX, Ideogram 4, FIBO 2, Kandinsky 5: blocks of one stream that text joins or feeds."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from tests.families.pipelines import family
from tests.families.pipelines.parts import (
    CHANNELS,
    DRAW,
    WIDTH,
    clip,
    decoder_size,
    flow,
    flux2_vae,
    gemma2,
    image_vae,
    qwen3,
    qwen3_vl,
    qwen_vl,
    transformer,
)
from tests.families.pipelines.words import clip_tokenizer, gemma_tokenizer, qwen_tokenizer

_DRAW = DRAW | {"max_sequence_length": 32}


@family("z_image", _DRAW | {"guidance_scale": 0.0})
def z_image() -> Any:
    tokenizer = qwen_tokenizer()
    return diffusers.ZImagePipeline(
        transformer=transformer("z_image"),
        vae=image_vae(),
        text_encoder=qwen3(tokenizer),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


@family("lumina2", _DRAW | {"height": 64, "width": 64, "guidance_scale": 1.0})
def lumina2() -> Any:
    """The pipeline's code says that there are 8 x 8 pixels a latent."""
    tokenizer = gemma_tokenizer()
    return diffusers.Lumina2Pipeline(
        transformer=transformer("lumina2", axes_lens=(256, 32, 32)),
        vae=image_vae(halvings=3),
        text_encoder=gemma2(tokenizer),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


@family("lumina_next", DRAW | {"height": 64, "width": 64, "guidance_scale": 1.0})
def lumina_next() -> Any:
    """The pipeline's code says that there are 8 x 8 pixels a latent."""
    tokenizer = gemma_tokenizer()
    return diffusers.LuminaPipeline(
        transformer=diffusers.LuminaNextDiT2DModel(
            sample_size=8,
            in_channels=CHANNELS,
            hidden_size=32,
            num_layers=5,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            cross_attention_dim=WIDTH,
        ),
        vae=image_vae(halvings=3, shift_factor=None),
        text_encoder=gemma2(tokenizer),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


@family("omnigen", DRAW | {"height": 64, "width": 64, "guidance_scale": 1.0}, needs="torchvision")
def omnigen() -> Any:
    """Without a text encoder: words enter the transformer. The code says that there are 8 x 8 pixels a latent."""
    tokenizer = qwen_tokenizer()
    return diffusers.OmniGenPipeline(
        transformer=transformer("omnigen", vocab_size=len(tokenizer)),
        vae=image_vae(halvings=3, shift_factor=None),
        tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
    )


@family(
    "prx",
    DRAW | {"guidance_scale": 1.0, "use_resolution_binning": False},
    needs="ftfy",
)
def prx() -> Any:
    tokenizer = gemma_tokenizer()
    size = decoder_size(tokenizer) | {
        "layer_types": ["full_attention"] * 2,
        "query_pre_attn_scalar": 8,
        "dropout_rate": 0.0,
    }
    encoder = transformers.T5GemmaModuleConfig(**size)
    config = transformers.T5GemmaConfig(
        encoder=encoder, decoder=encoder, is_encoder_decoder=False, vocab_size=len(tokenizer)
    )
    for key, value in encoder.to_dict().items():  # the encoder asks the pair for what is its own
        if not hasattr(config, key):
            setattr(config, key, value)
    return diffusers.PRXPipeline(
        transformer=diffusers.PRXTransformer2DModel(
            in_channels=CHANNELS, context_in_dim=WIDTH, hidden_size=32, num_heads=2, depth=5, axes_dim=[8, 8]
        ),
        vae=image_vae(),
        text_encoder=T5GemmaEncoder(config),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


@family("ideogram4", _DRAW | {"guidance_scale": 1.0, "guidance_schedule": None})
def ideogram4() -> Any:
    """With a second transformer for guidance; the pipeline's code names 13 layers of its text encoder of 36."""
    tokenizer = qwen_tokenizer()
    pair = [
        diffusers.Ideogram4Transformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=5,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=48,
            adaln_dim=16,
            llm_features_dim=13 * WIDTH,
            mrope_section=(4, 2, 2),
        )
        for _ in range(2)
    ]
    return diffusers.Ideogram4Pipeline(
        transformer=pair[0],
        unconditional_transformer=pair[1],
        vae=flux2_vae(),
        text_encoder=qwen3_vl(tokenizer, whole=False, layers=36),
        tokenizer=tokenizer,
        scheduler=flow(),
    )


@family("bria_fibo2", DRAW | {"guidance_scale": 1.0})
def bria_fibo2() -> Any:
    """The pipeline's code names bundles of three layers of its text encoder of 36."""
    tokenizer = qwen_tokenizer()
    return diffusers.BriaFibo2Pipeline(
        transformer=diffusers.BriaFibo2Transformer2DModel(
            in_channels=CHANNELS,
            dim=32,
            n_layers=8,
            n_heads=2,
            cap_feat_dim=3 * WIDTH,
            injection_layer_ids=(1, 2, 4, 5, 6),
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=2,
            gist_min_text_len=4,
            gist_max_text_len=32,
            axes_dims=(4, 6, 6),
            axes_lens=(256, 32, 32),
        ),
        vae=flux2_vae(),
        text_encoder=qwen3_vl(tokenizer, layers=36),
        processor=tokenizer,  # the published one reads pictures too and wants torchvision
        scheduler=flow(),
    )


@family("kandinsky5_t2i", DRAW | {"guidance_scale": 1.0, "max_sequence_length": 32})
def kandinsky5() -> Any:
    """The pipeline's code draws a million pixels, and says that there are 8 x 8 of them a latent."""
    tokenizer, words = qwen_tokenizer(), clip_tokenizer()
    return diffusers.Kandinsky5T2IPipeline(
        transformer=transformer("kandinsky5"),
        vae=image_vae(halvings=3, block_out_channels=[4] * 4, layers_per_block=1, mid_block_add_attention=False),
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,  # the published one reads pictures too and wants torchvision
        text_encoder_2=clip(words),
        tokenizer_2=words,
        scheduler=flow(),
    )
