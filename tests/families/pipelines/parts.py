"""Tiny random parts that stock pipelines are put together from: transformers, text encoders, VAEs, a source picture."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import transformers
from PIL import Image
from torch import nn

from tests.families.pipelines.words import CAPTION
from tests.families.teachers import TEACHERS

CHANNELS = 4
"""Latent channels of every VAE."""
SCALE = 2
"""Pixels a latent, each way."""
SIDE = 16
"""Pixels of a picture, each way."""
WIDTH, POOLED = 16, 8
"""Channels of embeddings and of pooled embeddings, where a family has them."""

DRAW: dict[str, Any] = {"prompt": CAPTION, "height": SIDE, "width": SIDE}


def transformer(name: str, **changes: Any) -> nn.Module:
    """The tiny teacher of this name, with a few keys of its configuration changed."""
    teacher = TEACHERS[name]
    return getattr(diffusers, teacher.class_name)(**teacher.config | changes)


def flow() -> Any:
    """The scheduler of most families."""
    return diffusers.FlowMatchEulerDiscreteScheduler()


def source(side: int = SIDE) -> Image.Image:
    """A picture to edit."""
    shade = np.arange(side * side * 3, dtype=np.uint32).reshape(side, side, 3) % 255
    return Image.fromarray(shade.astype(np.uint8))


# Text encoders


def clip(tokenizer: Any, projection: int = 0) -> nn.Module:
    """With a projection of so many channels, where one is wanted."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or POOLED,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.CLIPTextModelWithProjection(config) if projection else transformers.CLIPTextModel(config)


def t5(tokenizer: Any, width: int = WIDTH) -> nn.Module:
    return transformers.T5EncoderModel(transformers.T5Config(**_t5_size(tokenizer, width)))


def umt5(tokenizer: Any, width: int = WIDTH) -> nn.Module:
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**_t5_size(tokenizer, width)))


def _t5_size(tokenizer: Any, width: int) -> dict[str, Any]:
    return {"vocab_size": len(tokenizer), "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}


def decoder_size(tokenizer: Any, width: int = WIDTH, layers: int = 2) -> dict[str, Any]:
    """Keys that the configurations of Gemma, Llama, Mistral and Qwen share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }


def gemma2(tokenizer: Any, width: int = WIDTH) -> nn.Module:
    return transformers.Gemma2Model(transformers.Gemma2Config(**decoder_size(tokenizer, width)))


def qwen3(tokenizer: Any, causal: bool = False, **changes: Any) -> nn.Module:
    """With its language head where the pipeline asks for the causal model."""
    config = transformers.Qwen3Config(**decoder_size(tokenizer, **changes))
    return transformers.Qwen3ForCausalLM(config) if causal else transformers.Qwen3Model(config)


def qwen_vl(tokenizer: Any) -> nn.Module:
    """Qwen2.5-VL that reads text and pictures."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    text = decoder_size(tokenizer) | {"rope_parameters": _ROTARY | {"rope_theta": 1e4}}
    del text["head_dim"]
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_vision_tokens(tokenizer))
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(tokenizer: Any, whole: bool = True, **changes: Any) -> nn.Module:
    """Qwen3-VL that reads text and pictures, with its language head where `whole`."""
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    text = decoder_size(tokenizer, **changes) | {"rope_parameters": _ROTARY | {"rope_theta": 1e4}}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_vision_tokens(tokenizer))
    return transformers.Qwen3VLForConditionalGeneration(config) if whole else transformers.Qwen3VLModel(config)


def mistral3(tokenizer: Any, whole: bool = True, layers: int = 2) -> nn.Module:
    """Mistral 3 that reads text and pictures, with its language head where `whole`."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral"} | decoder_size(tokenizer, layers=layers),
        vision_config={"model_type": "pixtral", "image_size": 16, "patch_size": 4} | vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    return transformers.Mistral3ForConditionalGeneration(config) if whole else transformers.Mistral3Model(config)


def llama(tokenizer: Any, **changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**decoder_size(tokenizer, **changes)))


_ROTARY: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2]}


def _vision_tokens(tokenizer: Any) -> dict[str, Any]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))


def qwen_processor(tokenizer: Any) -> Any:
    """Of Qwen2-VL and Qwen2.5-VL; pictures become four tokens."""
    side = 56
    pixels = {"min_pixels": side * side, "max_pixels": side * side}
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(**pixels),
        chat_template=tokenizer.chat_template,
    )


def qwen3_processor(tokenizer: Any) -> Any:
    """Of Qwen3-VL; pictures become four tokens."""
    size = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=16, merge_size=2, size=size),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(size=size),
        chat_template=tokenizer.chat_template,
    )


# VAEs


def image_vae(halvings: int = 1, **changes: Any) -> nn.Module:
    """`AutoencoderKL` of pictures, half as wide and high each time."""
    levels = halvings + 1
    config: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [8] * levels,
        "norm_num_groups": 4,
        "latent_channels": CHANNELS,
        "scaling_factor": 0.36,
        "shift_factor": 0.12,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return diffusers.AutoencoderKL(**config | changes)


def flux2_vae() -> nn.Module:
    return diffusers.AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        latent_channels=CHANNELS,
    )


def qwen_vae(halvings: int = 1, width: int = 8, **changes: Any) -> nn.Module:
    """Of Qwen-Image."""
    config: dict[str, Any] = {
        "base_dim": width,
        "z_dim": CHANNELS,
        "dim_mult": [1] * (halvings + 1),
        "num_res_blocks": 1,
        "temperal_downsample": [False] * halvings,
    }
    return diffusers.AutoencoderKLQwenImage(**config | STATISTICS | changes)


def wan_vae(halvings: int = 1, **changes: Any) -> nn.Module:
    """Of Wan 2.1, for one picture."""
    config: dict[str, Any] = {
        "base_dim": 8,
        "z_dim": CHANNELS,
        "dim_mult": [1] * (halvings + 1),
        "num_res_blocks": 1,
        "temperal_downsample": [False] * halvings,
        "scale_factor_spatial": 2**halvings,
    }
    return diffusers.AutoencoderKLWan(**config | STATISTICS | changes)


STATISTICS: dict[str, list[float]] = {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [0.5, 0.7, 1.1, 1.3]}


def deep_vae() -> nn.Module:
    """`AutoencoderDC`, of Sana."""
    return diffusers.AutoencoderDC(
        latent_channels=CHANNELS,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41,
    )
