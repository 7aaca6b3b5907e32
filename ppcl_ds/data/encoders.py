"""Images to latents, captions to prompts: what an encoder is, the two that need no downloads, and the recipe's choice.

Shapes: B batch, C latent channels, H and W latent height and width, S text tokens, E embedding channels, P pooled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ppcl_ds.data.batch import Prompts
from ppcl_ds.sections import Data


class ImageEncoder(Protocol):
    """Images to latents and back."""

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """B RGB images of one size, a bucket's -> (B, C, H, W) float32 latents, as the teacher was trained on."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) latents -> (B, 1 or 3, height, width) pictures in [-1, 1]."""
        ...


class TextEncoder(Protocol):
    """Captions to prompts."""

    def encode(self, captions: Sequence[str]) -> Prompts:
        """B captions, the empty one included -> prompts, padded to the longest; every prompt has a token or more."""
        ...


class PixelEncoder:
    """The image itself as its latent: (B, channels, height, width) in [-1, 1].

    Args:
        channels: 1 (grey) or 3 (RGB).
    """

    def __init__(self, channels: int) -> None:
        self.mode = {1: "L", 3: "RGB"}[channels]

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """B RGB images of one size -> (B, C, height, width) float32 in [-1, 1]; colours become grey for one channel."""
        pixels = np.stack([np.array(image.convert(self.mode)) for image in images])  # (B, height, width[, 3]) uint8
        latents = rearrange(torch.from_numpy(pixels), "b h w ... -> b (...) h w")
        return latents.float() / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, clamped to [-1, 1]."""
        return latents.clamp(-1, 1)


class TableTextEncoder:
    """One fixed vector of N(0, 1) for each word, the same on every machine; words are all it understands.

    Values are rounded to bfloat16, so that shards, which store bfloat16, lose nothing.
    """

    def __init__(self, width: int, pooled_width: int = 0, max_tokens: int = 0) -> None:
        self.width = width
        self.pooled_width = pooled_width
        self.max_tokens = max_tokens
        self._vectors: dict[tuple[str, str], Tensor] = {}

    def encode(self, captions: Sequence[str]) -> Prompts:
        """B captions -> embeds (B, S, width), mask (B, S) unless `max_tokens` is set, pooled (B, P) if any.

        With `max_tokens` every prompt has exactly that many tokens: cut, or padded with zeros.
        """
        return Prompts.stack([self._encode_one(caption) for caption in captions])

    def _encode_one(self, caption: str) -> Prompts:
        words = re.findall(r"\w+", caption.lower()) or [""]  # the empty caption is one token of its own
        words = words[: self.max_tokens or None]
        mask = None if self.max_tokens else torch.ones(1, len(words), dtype=torch.bool)
        embeds = torch.zeros(1, self.max_tokens or len(words), self.width)
        embeds[0, : len(words)] = torch.stack([self._vector("token", word, self.width) for word in words])
        pooled = None
        if self.pooled_width:
            vectors = torch.stack([self._vector("pooled", word, self.pooled_width) for word in words])
            pooled = _as_stored(vectors.mean(dim=0, keepdim=True))
        return Prompts(embeds, mask, pooled)

    def _vector(self, table: str, word: str, width: int) -> Tensor:
        """(width,) row of `word` in `table`."""
        if (table, word) not in self._vectors:
            # Not `hash()`: Python salts it anew in every process.
            seed = int.from_bytes(hashlib.sha256(f"{table}:{word}".encode()).digest()[:8], "big")
            generator = torch.Generator().manual_seed(seed)
            self._vectors[table, word] = _as_stored(torch.randn(width, generator=generator))
        return self._vectors[table, word]


def image_encoder(data: Data, device: torch.device | str = "cpu") -> ImageEncoder:
    """The image encoder that a recipe's `data.images` asks for, its VAE, if any, on `device`.

    Raises:
        UserError: the VAE cannot be had from `data.pipeline`, or `data.images.step` does not suit it.
    """
    if data.images.encoder == "pixels":
        return PixelEncoder(data.images.channels)
    from ppcl_ds.data.pipelines import VaeEncoder  # imports diffusers' pipelines, which takes seconds

    assert data.pipeline is not None, "the recipe's check"
    return VaeEncoder(data.pipeline, data.images.step, device)


def text_encoder(data: Data, device: torch.device | str = "cpu") -> TextEncoder:
    """The text encoder that a recipe's `data.captions` asks for, its models, if any, on `device`.

    Raises:
        UserError: the text encoders cannot be had from `data.pipeline`, or differ from what `data.captions` says.
    """
    captions = data.captions
    if captions.encoder == "table":
        return TableTextEncoder(captions.width, captions.pooled_width, captions.max_tokens)
    from ppcl_ds.data.pipelines import PipelineTextEncoder  # as above

    assert data.pipeline is not None, "the recipe's check"
    return PipelineTextEncoder(data.pipeline, captions, device)


def without_padding(prompt: Prompts) -> Prompts:
    """One prompt, B = 1, as it is stored: without what its mask leaves out, or else without the zeros at its end.

    Families without a mask read zeros (Wan, whose loader puts them back) or embedded padding (FLUX, SD3), which is
    no zero and stays.
    """
    if prompt.mask is not None:
        return prompt.row(0)
    tokens = prompt.embeds[0].any(dim=-1).nonzero()  # (N, 1) places that hold something
    return replace(prompt, embeds=prompt.embeds[:, : int(tokens.max()) + 1 if len(tokens) else 1])


def _as_stored(values: Tensor) -> Tensor:
    return values.bfloat16().float()
