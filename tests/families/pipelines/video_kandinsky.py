"""Tiny pipelines of Kandinsky 5 and Sana-Video."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.families.pipelines import family
from tests.families.pipelines.parts import CHANNELS, POOLED, WIDTH
from tests.families.pipelines.video_parts import (
    clip_text,
    decoder_config,
    hunyuan_vae,
    picture,
    qwen_eyes,
    tokenizer,
    wan_vae,
)
from tests.families.pipelines.words import CAPTION

SIZE = 32
CALL: dict[str, Any] = {
    "prompt": CAPTION,
    "height": SIZE,
    "width": SIZE,
    "num_frames": 9,
    "guidance_scale": 1.0,
    "max_sequence_length": 32,
}


def parts(sees: bool) -> dict[str, Any]:
    """Kandinsky's; a transformer that sees reads condition latents and their mask beside the noisy ones."""
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_text_dim=WIDTH,
        in_text_dim2=POOLED,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=4,
        axes_dims=(4, 4, 4),
        visual_cond=sees,
    )
    return {
        # 128 tokens come before the prompt: these, three marks and the spelled word "user"
        "tokenizer": tokenizer(eos=False, length=300, instruction=(r"system\n[^<]*", 121)),
        "text_encoder": qwen_eyes(),
        **clip_text(),
        "vae": hunyuan_vae(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        "transformer": transformer,
    }


@family("kandinsky5_t2v", CALL)
def kandinsky5_t2v() -> Any:
    return diffusers.Kandinsky5T2VPipeline(**parts(sees=False))


@family("kandinsky5_i2v", CALL | {"image": picture(SIZE), "num_frames": 21}, image=True)
def kandinsky5_i2v() -> Any:
    """It ends by matching the first four frames of latents with those that follow: there must be more than four."""
    return diffusers.Kandinsky5I2VPipeline(**parts(sees=True))


SANA: dict[str, Any] = {name: value for name, value in CALL.items() if name != "num_frames"}


@family(
    "sana_video",
    SANA | {"frames": 5, "use_resolution_binning": False, "complex_human_instruction": None},
)
def sana_video() -> Any:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_size=8,
        rope_max_seq_len=32,
    )
    config = transformers.Gemma2Config(**decoder_config(layers=2, head_dim=8))
    return diffusers.SanaVideoPipeline(
        tokenizer=tokenizer(eos=False),
        text_encoder=transformers.Gemma2Model(config),
        vae=wan_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
        transformer=transformer,
    )
