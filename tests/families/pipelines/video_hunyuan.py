"""Tiny pipelines of HunyuanVideo and HunyuanVideo 1.5."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.guiders import ClassifierFreeGuidance

from tests.families.pipelines import family
from tests.families.pipelines.parts import CHANNELS, POOLED, WIDTH, t5
from tests.families.pipelines.video_parts import (
    chat,
    clip_text,
    decoder_config,
    hunyuan15_vae,
    hunyuan_vae,
    picture,
    qwen_config,
    siglip_eyes,
    tokenizer,
)
from tests.families.pipelines.words import CAPTION

SIZE, FRAMES = 32, 9
CONFIG: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 3,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "text_embed_dim": WIDTH,
    "pooled_projection_dim": POOLED,
    "rope_axes_dim": (2, 4, 4),
}
CALL: dict[str, Any] = {
    "prompt": CAPTION,
    "prompt_template": {"template": "{}", "crop_start": 0},  # upstream's is 95 tokens of the real vocabulary
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "max_sequence_length": 16,
}


def llama() -> dict[str, Any]:
    encoder = transformers.LlamaModel(transformers.LlamaConfig(**decoder_config()))
    return {"tokenizer": tokenizer(eos=False), "text_encoder": encoder}


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)


@family("hunyuan_video", CALL | {"guidance_scale": 6.0})
def hunyuan_video() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(**CONFIG, guidance_embeds=True)
    return diffusers.HunyuanVideoPipeline(
        **llama(), **clip_text(), vae=hunyuan_vae(), scheduler=flow(), transformer=transformer
    )


TURNS = "<image> {} <|im_start|> <|im_start|> <|im_start|> <|end_header_id|>"
"""A word for the image, and four after the prompt that the pipeline takes out again."""
PATCHES = 4
"""Tokens of an image."""
TEMPLATE = {
    "template": TURNS,
    "crop_start": 1,
    "image_emb_start": 0,
    "image_emb_end": PATCHES,
    "image_emb_len": PATCHES,
}


@family("hunyuan_i2v", CALL | {"image": picture(SIZE), "prompt_template": TEMPLATE}, image=True)
def hunyuan_i2v() -> Any:
    eyes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    llava: dict[str, Any] = {
        "text_config": decoder_config(model_type="llama"),
        "vision_config": {**eyes, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
        "image_token_index": 4,
        "pad_token_id": 0,
        "vision_feature_layer": -1,
    }
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **CONFIG | {"in_channels": 2 * CHANNELS + 1}, guidance_embeds=False, image_condition_type="latent_concat"
    )
    square = {"height": 8, "width": 8}
    return diffusers.HunyuanVideoImageToVideoPipeline(
        tokenizer=tokenizer(eos=False),
        text_encoder=transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**llava)),
        **clip_text(),
        vae=hunyuan_vae(),
        scheduler=flow(),
        transformer=transformer,
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=square),
    )


FRAMEPACK_CALL = CALL | {"image": picture(SIZE), "latent_window_size": 3, "guidance_scale": 6.0}


@family("framepack", FRAMEPACK_CALL, image=True)
def framepack() -> Any:
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **CONFIG | {"patch_size": 2},
        guidance_embeds=True,
        has_image_proj=True,
        image_proj_dim=WIDTH,
        has_clean_x_embedder=True,
    )
    return diffusers.HunyuanVideoFramepackPipeline(
        **llama(), **clip_text(), **siglip_eyes(), vae=hunyuan_vae(), scheduler=flow(), transformer=transformer
    )


def parts15(task: str) -> dict[str, Any]:
    """Whatever HunyuanVideo 1.5 makes videos with, from text ("t2v") or from an image ("i2v")."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=POOLED,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type=task,
    )
    letters = transformers.ByT5Tokenizer()
    return {
        "tokenizer": tokenizer(eos=False, length=1200, chat=chat(cut=108)),
        "text_encoder": transformers.Qwen2_5_VLTextModel(transformers.Qwen2_5_VLTextConfig(**qwen_config())),
        "tokenizer_2": letters,
        "text_encoder_2": t5(letters, POOLED),
        "transformer": transformer,
        "vae": hunyuan15_vae(),
        "scheduler": flow(),
        "guider": ClassifierFreeGuidance(guidance_scale=1.0),
    }


CALL15: dict[str, Any] = {"prompt": f'{CAPTION} "two"', "num_frames": 5}
"""The quoted word goes through the glyphs' encoder too."""


@family("hunyuan_video15", CALL15 | {"height": 16, "width": 16})
def hunyuan_video15() -> Any:
    return diffusers.HunyuanVideo15Pipeline(**parts15("t2v"))


@family("hunyuan15_i2v", CALL15 | {"image": picture(16)}, image=True)
def hunyuan15_i2v() -> Any:
    return diffusers.HunyuanVideo15ImageToVideoPipeline(**parts15("i2v"), **siglip_eyes(width=12))
