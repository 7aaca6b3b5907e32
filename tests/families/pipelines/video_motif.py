"""Tiny pipelines of Motif-Video."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.guiders import ClassifierFreeGuidance

from tests.families.pipelines import family
from tests.families.pipelines.parts import CHANNELS, WIDTH
from tests.families.pipelines.video_parts import decoder_config, tokenizer, wan_vae
from tests.families.pipelines.words import CAPTION

SIZE = 16
CALL = {"prompt": CAPTION, "height": SIZE, "width": SIZE, "num_frames": 5, "max_sequence_length": 16}


@family("motif", CALL)
def motif() -> Any:
    """A guider stands for the scale of guidance."""
    text = transformers.T5Gemma2TextConfig(**decoder_config(layers=2, head_dim=8, dropout_rate=0.0))
    eyes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.T5Gemma2EncoderConfig(
        text_config=text, vision_config={**eyes, "image_size": 8, "patch_size": 4}, mm_tokens_per_image=4
    )
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        num_single_layers=3,
        patch_size=1,
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 4, 4),
    )
    return diffusers.MotifVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=transformers.T5Gemma2Encoder(encoder),
        vae=wan_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer,
        guider=ClassifierFreeGuidance(guidance_scale=1.0),
        feature_extractor=None,
    )
