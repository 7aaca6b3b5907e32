"""Tiny pipelines of LTX-Video and LTX-2."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from tests.families.pipelines import family
from tests.families.pipelines.parts import CHANNELS, WIDTH
from tests.families.pipelines.video_parts import decoder_config, ltx_vae, picture, t5_text, tokenizer
from tests.families.pipelines.words import CAPTION

SIZE, FRAMES = 32, 9
CALL: dict[str, Any] = {
    "prompt": CAPTION,
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
}


def parts() -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        num_layers=4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
    )
    return {**t5_text(), "vae": ltx_vae(), "scheduler": scheduler, "transformer": transformer}


@family("ltx", CALL)
def ltx() -> Any:
    return diffusers.LTXPipeline(**parts())


@family("ltx_i2v", CALL | {"image": picture(SIZE)}, image=True)
def ltx_i2v() -> Any:
    return diffusers.LTXImageToVideoPipeline(**parts())


MELS, VOICES = 8, 2
"""Bands of a spectrogram, and channels of its latents, which are a quarter as fine."""
UNGUIDED: dict[str, Any] = {
    f"{sound}{name}": value
    for sound in ("", "audio_")
    for name, value in {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}.items()
}
CALL2 = CALL | UNGUIDED | {"spatio_temporal_guidance_blocks": None, "use_cross_timestep": False, "frame_rate": 25.0}


def gemma() -> Any:
    """A Gemma 3 with eyes, of which only what it reads is used."""
    eyes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=decoder_config(layers=2, head_dim=8),
        vision_config={**eyes, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def parts2() -> dict[str, Any]:
    """LTX-2 makes a clip and its sound; connectors stand between Gemma and the transformer."""
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=VOICES * MELS // 4,
        audio_out_channels=VOICES * MELS // 4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=4,
        caption_channels=WIDTH,
        vae_scale_factors=(4, 4, 4),
    )
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=3,  # Gemma's embeddings and its two layers
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("spatiotemporal",) * 2,
        upsample_type=("spatiotemporal",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
        patch_size=1,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=VOICES, mel_bins=MELS
    )
    vocoder = LTX2Vocoder(
        in_channels=2 * MELS,
        hidden_channels=16,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return {
        "tokenizer": tokenizer(),
        "text_encoder": gemma(),
        "connectors": connectors,
        "transformer": transformer,
        "vae": vae,
        "audio_vae": audio_vae,
        "vocoder": vocoder,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


@family("ltx2", CALL2)
def ltx2() -> Any:
    return diffusers.LTX2Pipeline(**parts2())
