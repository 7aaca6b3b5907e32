"""Images to latents, captions to prompts: what an encoder is, and the two that need no downloads.

Shapes: B batch, C latent channels, H and W latent height and width, S text tokens, E embedding channels, P pooled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ppcl_ds.data.batch import Prompts
from ppcl_ds.sections import CaptionEncoding, ImageEncoding


class ImageEncoder(Protocol):
    """Images to latents and back."""

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """B images of any size and mode -> (B, C, H, W) float32 latents, as the teacher was trained on."""
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
    """The image itself as its latent: (B, channels, size, size) in [-1, 1]."""

    def __init__(self, channels: int, size: int) -> None:
        self.mode = {1: "L", 3: "RGB"}[channels]
        self.size = (size, size)

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """B images -> (B, C, size, size) float32 in [-1, 1]; colours are converted, other sizes are resized."""
        pixels = torch.stack([self._pixels(image) for image in images])  # (B, size, size, C) uint8
        return rearrange(pixels, "b h w c -> b c h w").float() / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, clamped to [-1, 1]."""
        return latents.clamp(-1, 1)

    def _pixels(self, image: Image.Image) -> Tensor:
        image = image.convert(self.mode)
        if image.size != self.size:
            image = image.resize(self.size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).reshape(*self.size, -1)


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


def image_encoder(section: ImageEncoding) -> ImageEncoder:
    """The image encoder that a recipe's `data.images` asks for."""
    return PixelEncoder(section.channels, section.size)


def text_encoder(section: CaptionEncoding) -> TextEncoder:
    """The text encoder that a recipe's `data.captions` asks for."""
    return TableTextEncoder(section.width, section.pooled_width, section.max_tokens)


def _as_stored(values: Tensor) -> Tensor:
    return values.bfloat16().float()
