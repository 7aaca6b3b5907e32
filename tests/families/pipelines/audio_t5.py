"""Tiny pipelines that make sound from the text of a T5: Stable Audio in two releases, LongCat-Audio."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

from tests.families.pipelines import family
from tests.families.pipelines.parts import CHANNELS, WIDTH
from tests.families.pipelines.video_parts import decoder_config, t5_text, tokenizer, umt5_text
from tests.families.pipelines.words import CAPTION

CALL: dict[str, Any] = {"prompt": CAPTION, "guidance_scale": 1.0}


@family("stable_audio", CALL | {"audio_end_in_s": 2.0}, needs="torchsde")
def stable_audio() -> Any:
    width = 8
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=width,
        cross_attention_input_dim=width,
        time_proj_dim=8,
        global_states_input_dim=2 * width,  # where the clip begins and where it ends
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=CHANNELS,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    scheduler = diffusers.CosineDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0)
    projection = StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=width, min_value=0, max_value=32)
    return diffusers.StableAudioPipeline(
        **t5_text(length=16), projection_model=projection, transformer=transformer, vae=vae, scheduler=scheduler
    )


@family("stable_audio3", CALL | {"duration": 1.0})
def stable_audio3() -> Any:
    from diffusers.pipelines.stable_audio_3 import (
        StableAudio3DurationEmbedder,  # newer than the oldest diffusers that is served
    )

    transformer = diffusers.StableAudio3DiTModel(
        io_channels=CHANNELS,
        embed_dim=32,
        depth=4,
        num_heads=2,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=CHANNELS + 1,  # a clip to continue and its mask
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=3,
    )
    vae = diffusers.AutoencoderSAME(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=CHANNELS,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    )
    encoder = decoder_config(layers=2, head_dim=8)
    config = transformers.T5GemmaConfig(encoder=encoder, decoder=encoder, is_encoder_decoder=False)
    return diffusers.StableAudio3Pipeline(
        tokenizer=tokenizer(length=16),
        text_encoder=transformers.T5GemmaEncoderModel(config),
        duration_embedder=StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16),
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )


@family("longcat_audio", CALL | {"audio_duration_s": 0.01})
def longcat_audio() -> Any:
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=4, dit_heads=2, dit_text_dim=WIDTH, latent_dim=CHANNELS, text_conv=False
    )
    vae = diffusers.LongCatAudioDiTVae(
        channels=8, c_mults=[1, 2], strides=[2], latent_dim=CHANNELS, encoder_latent_dim=8, downsampling_ratio=2
    )
    return diffusers.LongCatAudioDiTPipeline(**umt5_text(), transformer=transformer, vae=vae)
