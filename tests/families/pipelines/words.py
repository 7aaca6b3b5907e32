"""Real tokenizers of a few words, made here: byte pairs for chat models and CLIP, pieces for T5, letters for BERT."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

import transformers

from tests.data.tiny_pipelines import learn_byte_pairs

CAPTION = "a tiny red cat"

_WORDS = (
    "a tiny zero one two three red blue cat dog "
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:\nuser\nassistant\n"
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.\nPicture 1:"
)
"""The captions of tests, and templates of pipelines that count the tokens which they cut off."""

_CHAT_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
_CLIP_WORDS = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

_CHAT_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
]
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Any:
    """Of Qwen 2, 2.5 and 3, with the tokens of conversations and of pictures."""
    tokenizer = transformers.Qwen2Tokenizer(**_byte_pairs(_CHAT_WORDS, end_of_word=""))
    tokenizer.add_special_tokens({"additional_special_tokens": _CHAT_TOKENS})
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def clip_tokenizer() -> Any:
    pairs = _byte_pairs(_CLIP_WORDS, end_of_word="</w>")
    for token in ("<|startoftext|>", "<|endoftext|>"):
        pairs["vocab"][token] = len(pairs["vocab"])
    return transformers.CLIPTokenizer(**pairs, model_max_length=77)


def t5_tokenizer() -> Any:
    """Of T5 and UMT5."""
    pieces = [f"\u2581{word}" for word in dict.fromkeys(_WORDS.split())]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    scores += [(piece, -2.0) for piece in pieces] + [(letter, -6.0) for letter in string.printable[:94]]
    return transformers.T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512)


def gemma_tokenizer() -> Any:
    """Of Gemma 1 to 3: byte pairs over words that begin with a low line."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    letters = ["\u2581", "\n", *string.printable[:94], *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(special + letters))}
    tokenizer = transformers.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=512, add_bos_token=True)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def llama_tokenizer() -> Any:
    """Of Llama 3: byte pairs as Qwen's, with a token that begins a text."""
    pairs = _byte_pairs(_CHAT_WORDS, end_of_word="")
    pairs["vocab"]["<|begin_of_text|>"] = len(pairs["vocab"])
    tokenizer = transformers.GPT2Tokenizer(
        **pairs, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|pad|>", add_bos_token=True
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def bert_tokenizer() -> Any:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.printable[:94], *_WORDS.lower().split()]
    return transformers.BertTokenizer(vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))})


def _byte_pairs(words: str, end_of_word: str) -> dict[str, Any]:
    vocabulary, merges = _learnt(words, end_of_word)
    return {"vocab": dict(vocabulary), "merges": list(merges)}


@cache
def _learnt(words: str, end_of_word: str) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    return learn_byte_pairs(_WORDS, words, end_of_word)
