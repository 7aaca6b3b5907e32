"""Tiny pipelines of Cosmos; what checks its prompts and frames is replaced, because the real one downloads models."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
from diffusers.pipelines.cosmos import (
    pipeline_cosmos2_5_predict,
    pipeline_cosmos2_video2world,
    pipeline_cosmos_text2world,
)

from tests.families.pipelines import family
from tests.families.pipelines.parts import CHANNELS, WIDTH
from tests.families.pipelines.video_parts import chat, picture, qwen_eyes, t5_text, tokenizer, wan_vae
from tests.families.pipelines.words import CAPTION

SIZE = 32
CALL: dict[str, Any] = {
    "prompt": CAPTION,
    "height": SIZE,
    "width": SIZE,
    "num_frames": 5,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
}
CONFIG: dict[str, Any] = {
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 4,
    "mlp_ratio": 2,
    "text_embed_dim": WIDTH,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "concat_padding_mask": False,  # the mask is resized by torchvision, which tests do without
}


class Unchecked:
    """Lets every prompt and every frame pass. Not a module, so that it is not saved: each pipeline makes its own."""

    def to(self, *_: Any) -> Unchecked:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


for _module in (pipeline_cosmos_text2world, pipeline_cosmos2_video2world, pipeline_cosmos2_5_predict):
    vars(_module)["CosmosSafetyChecker"] = Unchecked


@family("cosmos", CALL | {"num_frames": 9})
def cosmos() -> Any:
    """Text to world, first release: noise levels and preconditioning of EDM."""
    frames = 3  # of latents: its statistics are per frame
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        latents_mean=[mean for mean in (0.1, -0.2, 0.3, -0.4) for _ in range(frames)],
        latents_std=[scale for scale in (0.5, 0.7, 1.1, 1.3) for _ in range(frames)],
    )
    return diffusers.CosmosTextToWorldPipeline(
        **t5_text(),
        vae=vae,
        scheduler=diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min"),
        transformer=diffusers.CosmosTransformer3DModel(**CONFIG, in_channels=CHANNELS),
    )


@family("cosmos_predict2", CALL | {"image": picture(SIZE)}, image=True)
def cosmos_predict2() -> Any:
    """An image goes on as a clip: latents and a mask of the given frames."""
    return diffusers.Cosmos2VideoToWorldPipeline(
        **t5_text(),
        vae=wan_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        transformer=diffusers.CosmosTransformer3DModel(**CONFIG, in_channels=CHANNELS + 1, extra_pos_embed_type=None),
    )


@family("cosmos25", CALL)
def cosmos25() -> Any:
    """Its text is all layers of a Qwen side by side."""
    return diffusers.Cosmos2_5_PredictBasePipeline(
        tokenizer=tokenizer(eos=False, chat=chat(cut=2)),
        text_encoder=qwen_eyes(),
        vae=wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True
        ),
        transformer=diffusers.CosmosTransformer3DModel(
            **CONFIG,
            in_channels=CHANNELS + 1,
            extra_pos_embed_type=None,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=3 * WIDTH,
            encoder_hidden_states_channels=WIDTH,
        ),
    )
