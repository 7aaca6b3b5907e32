"""A tiny pipeline of ACE-Step, which makes songs."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.families.pipelines import family
from tests.families.pipelines.parts import WIDTH
from tests.families.pipelines.video_parts import decoder_config, tokenizer
from tests.families.pipelines.words import CAPTION

SOUND = 8
"""Channels of latents."""
ATTENTION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 2,
}


@family(
    "ace_step",
    {
        "prompt": CAPTION,
        "lyrics": "one two three",
        "audio_duration": 0.4,
        "guidance_scale": 1.0,
        "max_text_length": 512,
        "max_lyric_length": 64,
    },
)
def ace_step() -> Any:
    """Its blocks look near and far by turns; a condition encoder stands between the text and the transformer."""
    from diffusers.pipelines.ace_step import AceStepConditionEncoder  # newer than the oldest diffusers that is served

    transformer = diffusers.AceStepTransformer1DModel(
        **ATTENTION, num_hidden_layers=4, in_channels=3 * SOUND, audio_acoustic_hidden_dim=SOUND
    )
    conditions = AceStepConditionEncoder(
        **ATTENTION,
        text_hidden_dim=WIDTH,
        timbre_hidden_dim=SOUND,
        num_lyric_encoder_hidden_layers=2,
        num_timbre_encoder_hidden_layers=2,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=SOUND,
        channel_multiples=[2, 4],
        sampling_rate=40,
    )
    config = transformers.Qwen3Config(**decoder_config(layers=2, head_dim=8))
    return diffusers.AceStepPipeline(
        tokenizer=tokenizer(length=512),
        text_encoder=transformers.Qwen3Model(config),
        condition_encoder=conditions,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
