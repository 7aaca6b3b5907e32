"""What tiny video and audio pipelines are put together from: tokenizers, text and image encoders, VAEs, all random."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from tests.families.pipelines.parts import CHANNELS, POOLED, STATISTICS, WIDTH, clip, t5, umt5
from tests.families.pipelines.words import clip_tokenizer, t5_tokenizer

_WORDS = ("a", "tiny", "zero", "one", "two", "three", "red", "blue", "cat", "dog")
_TOKENS = ("<pad>", "</s>", "<unk>", "<s>", "<image>", "<|im_start|>", "<|im_end|>", "<|end_header_id|>")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()[]{}<>|_-#/\\"


def picture(size: int) -> Image.Image:
    """A square source image with a gradient in it."""
    return Image.linear_gradient("L").resize((size, size)).convert("RGB")


def tokenizer(
    eos: bool = True,
    length: int = 64,
    chat: str | None = None,
    instruction: tuple[str, int] | None = None,
    **options: Any,
) -> Any:
    """Words of the tests' captions are one token each, all others are spelled; the end is marked as T5 does.

    Args:
        eos: whether every text ends with the end token.
        length: the longest text, in tokens.
        chat: a chat template, for pipelines that speak in turns.
        instruction: a pattern for what a pipeline writes before every prompt, and how many tokens it counts there.
    """
    pieces = [*_TOKENS, *_WORDS, *(f"{mark}{letter}" for mark in ("", "##") for letter in _LETTERS)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    learned = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=200))
    learned.normalizer = normalizers.Lowercase()
    if instruction:
        pattern, tokens = instruction
        told = normalizers.Replace(Regex(pattern), "a " * tokens)
        learned.normalizer = normalizers.Sequence([told, normalizers.Lowercase()])
    learned.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if eos:
        learned.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    named: dict[str, Any] = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>")
    named["additional_special_tokens"] = list(_TOKENS[4:])
    options.setdefault("padding_side", "right")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=learned, model_max_length=length, **named | options)
    made.chat_template = chat
    return made


def chat(cut: int) -> str:
    """A template under which the user's words follow `cut` tokens, as many as the pipeline will cut off."""
    before = "{{ '<|im_start|>' * " + str(cut) + " }}"
    return (
        f"{before}{{% for message in messages %}}{{% if message.role == 'user' %}}"
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{% endif %}"
        "{% endif %}{% endfor %}{{ '<|im_end|>' }}"
    )


def t5_text(length: int = 64) -> dict[str, Any]:
    """T5 and its tokenizer; the longest text has so many tokens."""
    words = t5_tokenizer()
    words.model_max_length = length
    return {"tokenizer": words, "text_encoder": t5(words)}


def umt5_text() -> dict[str, Any]:
    """What Wan and its relatives read text with."""
    words = t5_tokenizer()
    return {"tokenizer": words, "text_encoder": umt5(words)}


def decoder_config(layers: int = 3, **options: Any) -> dict[str, Any]:
    """A small language model that reads what `tokenizer` makes."""
    return {
        "vocab_size": len(tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 3,
        "eos_token_id": 1,
        **options,
    }


def qwen_config(**options: Any) -> dict[str, Any]:
    """The language model of a Qwen with eyes."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    return decoder_config(rope_parameters=rope, **options)


def qwen_eyes() -> nn.Module:
    """A whole Qwen 2.5 with eyes."""
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=qwen_config(), vision_config=eyes, image_token_id=4)
    )


def clip_text() -> dict[str, Any]:
    """CLIP and its tokenizer, where they come second."""
    words = clip_tokenizer()
    return {"tokenizer_2": words, "text_encoder_2": clip(words)}


def clip_eyes(size: int = 8, patch: int = 4) -> dict[str, Any]:
    """CLIP's image encoder and what prepares images for it."""
    config = transformers.CLIPVisionConfig(
        hidden_size=POOLED,
        intermediate_size=16,
        projection_dim=POOLED,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
    )
    return {
        "image_encoder": transformers.CLIPVisionModel(config),
        "image_processor": transformers.CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
    }


def siglip_eyes(width: int = WIDTH, size: int = 8, patch: int = 4) -> dict[str, Any]:
    """SigLIP's image encoder and what prepares images for it."""
    config = transformers.SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
    )
    return {
        "image_encoder": transformers.SiglipVisionModel(config),
        "feature_extractor": transformers.SiglipImageProcessor(size={"height": size, "width": size}),
    }


def wan_vae(**options: Any) -> nn.Module:
    """4 pixels a latent each way, 2 frames a latent."""
    config: dict[str, Any] = {
        "base_dim": 4,
        "z_dim": CHANNELS,
        "dim_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "scale_factor_spatial": 4,
        "scale_factor_temporal": 2,
    }
    return diffusers.AutoencoderKLWan(**config | STATISTICS | options)


def ltx_vae() -> nn.Module:
    """4 pixels and 4 frames a latent."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 3,
        downsample_type=("conv",) * 3,
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False),
        decoder_spatio_temporal_scaling=(True, True, False),
        decoder_inject_noise=(False,) * 4,
        upsample_residual=(False,) * 3,
        upsample_factor=(1,) * 3,
        patch_size=1,
    )


def hunyuan_vae(channels: int = CHANNELS) -> nn.Module:
    """8 pixels and 4 frames a latent, as the family's classes count on."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        block_out_channels=(8,) * 4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def hunyuan15_vae() -> nn.Module:
    """4 pixels and 2 frames a latent."""
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )


def cogvideox_vae(**options: Any) -> nn.Module:
    """8 pixels and 4 frames a latent."""
    return diffusers.AutoencoderKLCogVideoX(
        latent_channels=CHANNELS,
        block_out_channels=(8,) * 4,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=16,
        sample_width=16,
        **options,
    )
