"""Tiny random diffusers pipeline folders of four families, tokenizers included, made without downloads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from tests.conftest import TEACHERS, WAN

CHANNELS = 4
"""Latent channels of every VAE."""
SCALE = 2
"""Pixels a latent, each way."""
WIDTH, POOLED = 16, 8
"""Channels of embeddings and of pooled embeddings, where a family has them."""

_WORDS = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:\nuser\nassistant\na tiny zero one two three red blue cat dog"
)
"""Qwen-Image's template, so that each of its words is a token, as in the real vocabulary; and the tests' captions."""

_QWEN_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"


def make_pipeline(family: str, folder: Path) -> None:
    """Save a whole pipeline of "qwen", "flux", "sd3" or "wan": VAE, text encoders, tokenizers, transformer, scheduler.

    Its transformer reads latents of `CHANNELS` channels and, where the families differ, is `TEACHERS[family]`.
    """
    torch.manual_seed(0)
    class_name, make_parts = _FAMILIES[family]
    parts = make_parts()
    transformer_class, config = (TEACHERS | {"wan": WAN})[family]
    channels = {"in_channels": CHANNELS * (4 if family in ("qwen", "flux") else 1)}
    if family != "flux":
        channels["out_channels"] = CHANNELS
    transformer = getattr(diffusers, transformer_class)(**config | channels)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    getattr(diffusers, class_name)(transformer=transformer, scheduler=scheduler, **parts).save_pretrained(folder)


def _qwen() -> dict[str, Any]:
    tokenizer = transformers.Qwen2Tokenizer(**_byte_pairs(_QWEN_WORDS, end_of_word=""))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "vae": diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=CHANNELS, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], **_statistics()
        ),
    }


def _flux() -> dict[str, Any]:
    parts = {"tokenizer": _clip_tokenizer(), "tokenizer_2": _t5_tokenizer(), "vae": _image_vae()}
    parts["text_encoder"] = _clip(transformers.CLIPTextModel, parts["tokenizer"])
    parts["text_encoder_2"] = _t5(transformers.T5EncoderModel, transformers.T5Config, parts["tokenizer_2"])
    return parts


def _sd3() -> dict[str, Any]:
    parts = {"tokenizer": _clip_tokenizer(), "tokenizer_2": _clip_tokenizer(), "tokenizer_3": _t5_tokenizer()}
    for name in ("text_encoder", "text_encoder_2"):  # their pooled embeddings are joined
        parts[name] = _clip(transformers.CLIPTextModelWithProjection, parts["tokenizer"], projection_dim=POOLED // 2)
    parts["text_encoder_3"] = _t5(transformers.T5EncoderModel, transformers.T5Config, parts["tokenizer_3"])
    return parts | {"vae": _image_vae()}


def _wan() -> dict[str, Any]:
    tokenizer = _t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _t5(transformers.UMT5EncoderModel, transformers.UMT5Config, tokenizer),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=CHANNELS,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            scale_factor_spatial=SCALE,
            **_statistics(),
        ),
    }


_FAMILIES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "qwen": ("QwenImagePipeline", _qwen),
    "flux": ("FluxPipeline", _flux),
    "sd3": ("StableDiffusion3Pipeline", _sd3),
    "wan": ("WanPipeline", _wan),
}


def _statistics() -> dict[str, list[float]]:
    return {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [0.5, 0.7, 1.1, 1.3]}


def _image_vae() -> nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        latent_channels=CHANNELS,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(model_class: type[nn.Module], tokenizer: Any, projection_dim: int = POOLED) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model_class(config)


def _t5(model_class: type[nn.Module], config_class: Any, tokenizer: Any) -> nn.Module:
    size = {"vocab_size": len(tokenizer), "d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return model_class(config_class(**size))


def _clip_tokenizer() -> Any:
    pairs = _byte_pairs(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", end_of_word="</w>")
    for token in ("<|startoftext|>", "<|endoftext|>"):
        pairs["vocab"][token] = len(pairs["vocab"])
    return transformers.CLIPTokenizer(**pairs, model_max_length=77)


def _t5_tokenizer() -> Any:
    letters = sorted({letter for letter in _WORDS.lower() if letter.isalpha()})
    pieces = ["\u2581" + word.strip(",:") for word in dict.fromkeys(_WORDS.split())]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    scores += [(piece, -2.0) for piece in dict.fromkeys(pieces)] + [(letter, -6.0) for letter in letters]
    return transformers.T5Tokenizer(vocab=scores, extra_ids=0)


def _byte_pairs(words: str, end_of_word: str) -> dict[str, Any]:
    vocabulary, merges = learn_byte_pairs(_WORDS, words, end_of_word)
    return {"vocab": vocabulary, "merges": merges}


def learn_byte_pairs(text: str, words: str, end_of_word: str) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Vocabulary and merges of a byte-level BPE in which every word of a text is one token.

    Args:
        words: a regular expression for what is a word.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix=end_of_word))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=alphabet,
        # Else last letters are numbered as they are met in a hash table: otherwise in every process.
        special_tokens=[letter + end_of_word for letter in alphabet] if end_of_word else [],
        end_of_word_suffix=end_of_word,
        show_progress=False,
    )
    learner.train_from_iterator([text, *alphabet], trainer)
    model = json.loads(learner.to_str())["model"]
    return dict(model["vocab"]), [tuple(pair) for pair in model["merges"]]
