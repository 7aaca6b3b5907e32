"""Tiny pipelines of Wan and of what shares its blocks."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.families.pipelines import family
from tests.families.pipelines.parts import CHANNELS, POOLED, WIDTH
from tests.families.pipelines.video_parts import clip_eyes, picture, umt5_text, wan_vae
from tests.families.pipelines.words import CAPTION

SIZE, FRAMES = 16, 5
"""Pixels a side and frames of a draw: latents (1, CHANNELS, 3, 4, 4)."""
CALL: dict[str, Any] = {
    "prompt": CAPTION,
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
}
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
IMAGE = {"in_channels": 2 * CHANNELS + 2, "image_dim": POOLED, "added_kv_proj_dim": 24}
"""Latents, the first frame's latents and its mask, of as many channels as there are frames a latent; CLIP's tokens."""


def transformer(**options: Any) -> Any:
    return diffusers.WanTransformer3DModel(**CONFIG | options)


def unipc(shift: float = 3.0) -> Any:
    """The scheduler that Wan's own checkpoints come with."""
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def reads_image(transformer: Any, **parts: Any) -> dict[str, Any]:
    """Everything of a pipeline that CLIP sees for."""
    return {**umt5_text(), **clip_eyes(), "vae": wan_vae(), "scheduler": unipc(), "transformer": transformer, **parts}


@family("wan", CALL)
def wan() -> Any:
    return diffusers.WanPipeline(**umt5_text(), vae=wan_vae(), scheduler=unipc(), transformer=transformer())


@family("wan22", CALL)
def wan22() -> Any:
    experts = {"transformer": transformer(), "transformer_2": transformer()}
    return diffusers.WanPipeline(**umt5_text(), vae=wan_vae(), scheduler=unipc(), **experts, boundary_ratio=0.875)


@family("wan22_ti2v", CALL)
def wan22_ti2v() -> Any:
    return diffusers.WanPipeline(
        **umt5_text(), vae=wan_vae(), scheduler=unipc(), transformer=transformer(), expand_timesteps=True
    )


@family("wan_i2v", CALL | {"image": picture(SIZE)}, image=True, needs="ftfy")
def wan_i2v() -> Any:
    return diffusers.WanImageToVideoPipeline(**reads_image(transformer(**IMAGE)))


@family("vace", CALL | {"video": [picture(SIZE)] * FRAMES, "mask": [picture(SIZE).convert("L")] * FRAMES}, needs="ftfy")
def vace() -> Any:
    """A clip to change and where: two sets of latents and the mask, a channel for each pixel of a latent."""
    controlled = diffusers.WanVACETransformer3DModel(
        **CONFIG, vace_layers=[0, 2], vace_in_channels=2 * CHANNELS + 4 * 4
    )
    return diffusers.WanVACEPipeline(**umt5_text(), vae=wan_vae(), scheduler=unipc(), transformer=controlled)


@family("skyreels_v2", CALL, needs="ftfy")
def skyreels_v2() -> Any:
    return diffusers.SkyReelsV2Pipeline(
        **umt5_text(),
        vae=wan_vae(),
        scheduler=unipc(8.0),
        transformer=diffusers.SkyReelsV2Transformer3DModel(**CONFIG),
    )


@family("chronoedit", CALL | {"image": picture(SIZE)}, image=True, needs="ftfy")
def chronoedit() -> Any:
    editor = diffusers.ChronoEditTransformer3DModel(**CONFIG | IMAGE, rope_temporal_skip_len=8)
    return diffusers.ChronoEditPipeline(**reads_image(editor))


ANIMATE: dict[str, Any] = {name: value for name, value in CALL.items() if name != "num_frames"}
FACE = 16
"""Pixels a side of the clip of a face."""


@family(
    "wan_animate",
    ANIMATE
    | {
        "image": picture(SIZE),
        "pose_video": [picture(SIZE)] * FRAMES,
        "face_video": [picture(FACE)] * FRAMES,
        "segment_frame_length": FRAMES,
    },
    image=True,
    needs="ftfy",
)
def wan_animate() -> Any:
    """A face adapter sits behind every second block."""
    actor = diffusers.WanAnimateTransformer3DModel(
        **CONFIG | IMAGE | {"in_channels": 2 * CHANNELS + 4},
        latent_channels=CHANNELS,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=FACE,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    vae = wan_vae(temperal_downsample=[True, True], scale_factor_temporal=4)  # the class counts on four frames a latent
    return diffusers.WanAnimatePipeline(**reads_image(actor, vae=vae))


@family("helios", CALL | {"num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 1]}, needs="ftfy")
def helios() -> Any:
    """A clip is made chunk by chunk, each with a history of three resolutions."""
    config = {name: value for name, value in CONFIG.items() if name != "rope_max_seq_len"}
    return diffusers.HeliosPipeline(
        **umt5_text(),
        vae=wan_vae(),
        scheduler=diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True),
        transformer=diffusers.HeliosTransformer3DModel(**config, rope_dim=(4, 4, 4)),
    )


@family("anyflow", CALL)
def anyflow() -> Any:
    """A flow map: the transformer is told where a step begins and where it ends."""
    return diffusers.AnyFlowPipeline(
        **umt5_text(),
        vae=wan_vae(),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
        transformer=diffusers.AnyFlowTransformer3DModel(**CONFIG),
    )
