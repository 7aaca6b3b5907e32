"""Tiny pipelines of CogVideoX, its later release and ConsisID."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.families.pipelines import family
from tests.families.pipelines.parts import CHANNELS, WIDTH
from tests.families.pipelines.video_parts import cogvideox_vae, picture, t5_text
from tests.families.pipelines.words import CAPTION

SIZE, FRAMES, LATENT = 16, 9, 2
"""Pixels a side, frames, and latents a side."""
LENGTH = 16
CALL: dict[str, Any] = {
    "prompt": CAPTION,
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "guidance_scale": 1.0,
    "max_sequence_length": LENGTH,
}
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 4,
    "text_embed_dim": WIDTH,
    "num_layers": 4,
    "sample_width": LATENT,
    "sample_height": LATENT,
    "sample_frames": FRAMES,
    "max_text_seq_length": LENGTH,
}
ROTARY = {"use_rotary_positional_embeddings": True}


def parts() -> dict[str, Any]:
    """All but the transformer; the scheduler is that of the family's checkpoints."""
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        beta_schedule="scaled_linear",
        snr_shift_scale=1.0,
    )
    return {**t5_text(), "vae": cogvideox_vae(), "scheduler": scheduler}


def transformer(**options: Any) -> Any:
    return diffusers.CogVideoXTransformer3DModel(**CONFIG | options)


@family("cogvideox", CALL)
def cogvideox() -> Any:
    return diffusers.CogVideoXPipeline(**parts(), transformer=transformer())


@family("cogvideox15", CALL | {"num_frames": 9})
def cogvideox15() -> Any:
    later = transformer(**ROTARY, patch_size_t=2, patch_bias=False, ofs_embed_dim=None, sample_frames=FRAMES)
    return diffusers.CogVideoXPipeline(**parts(), transformer=later)


@family("cogvideox_i2v", CALL | {"image": picture(SIZE)}, image=True)
def cogvideox_i2v() -> Any:
    reader = transformer(**ROTARY, in_channels=2 * CHANNELS, use_learned_positional_embeddings=True)
    return diffusers.CogVideoXImageToVideoPipeline(**parts(), transformer=reader)


IDENTITY, TOKENS = 8, 4
"""Channels of what is known of a face, and of an image encoder's tokens of it, as many as channels here."""


@family(
    "consisid",
    CALL
    | {
        "image": picture(SIZE),
        "id_cond": torch.linspace(-1, 1, IDENTITY)[None],
        "id_vit_hidden": [torch.linspace(-1, 1, TOKENS * TOKENS).view(1, TOKENS, TOKENS)],
    },
    image=True,
    needs="cv2",
)
def consisid() -> Any:
    """Keeps a face: attention to it sits behind every second block."""
    keeper = diffusers.ConsisIDTransformer3DModel(
        **CONFIG | ROTARY | {"in_channels": 2 * CHANNELS},
        use_learned_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=IDENTITY,
        LFE_vit_dim=TOKENS,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=21,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )
    return diffusers.ConsisIDPipeline(**parts(), transformer=keeper)
