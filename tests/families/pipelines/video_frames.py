"""Tiny pipelines of single families whose frames go through a VAE of their own: Mochi, Allegro, Latte, EasyAnimate."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.families.pipelines import family
from tests.families.pipelines.parts import CHANNELS, WIDTH
from tests.families.pipelines.video_parts import chat, qwen_config, t5_text, tokenizer
from tests.families.pipelines.words import CAPTION

SIZE = 16
LENGTH = 16
CALL: dict[str, Any] = {"prompt": CAPTION, "height": SIZE, "width": SIZE, "guidance_scale": 1.0}


@family("mochi", CALL | {"num_frames": 7, "max_sequence_length": LENGTH})
def mochi() -> Any:
    channels = 12  # as many as the VAE has statistics for
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        pooled_projection_dim=WIDTH,
        in_channels=channels,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=LENGTH,
    )
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=channels,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(**t5_text(), transformer=transformer, vae=vae, scheduler=scheduler)


# It only works in tiles, and whether to do so is not saved: a pipeline that was loaded could draw nothing.
diffusers.AutoencoderKLAllegro._encode = diffusers.AutoencoderKLAllegro.tiled_encode
diffusers.AutoencoderKLAllegro._decode = diffusers.AutoencoderKLAllegro.tiled_decode


@family("allegro", CALL | {"num_frames": 8, "max_sequence_length": LENGTH, "clean_caption": False})
def allegro() -> Any:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        cross_attention_dim=24,
        sample_width=2,
        sample_height=2,
        sample_frames=2,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    return diffusers.AllegroPipeline(**t5_text(), transformer=transformer, vae=vae, scheduler=scheduler)


@family("latte", CALL | {"video_length": 2, "clean_caption": False})
def latte() -> Any:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=WIDTH,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        cross_attention_dim=24,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        latent_channels=CHANNELS,
    )
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", steps_offset=1, clip_sample=False)
    return diffusers.LattePipeline(**t5_text(length=120), transformer=transformer, vae=vae, scheduler=scheduler)


@family("easyanimate", CALL | {"num_frames": 5})
def easyanimate() -> Any:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=4,
        mmdit_layers=2,
        sample_width=SIZE,
        sample_height=SIZE,
        patch_size=2,
    )
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=CHANNELS,
        block_out_channels=[8] * 4,
        down_block_types=["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3],
        up_block_types=["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3],
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    eyes = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config=qwen_config(), vision_config=eyes, image_token_id=4)
    return diffusers.EasyAnimatePipeline(
        tokenizer=tokenizer(eos=False, length=300, chat=chat(cut=0)),
        text_encoder=transformers.Qwen2VLForConditionalGeneration(config),
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
