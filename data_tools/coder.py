"""Samples of a raw shard through both encoders: grouped by size into batches, given back in stored order.

Shapes: C latent channels, H and W latent height and width, S text tokens, E embedding channels, P pooled channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from data_tools.samples import caption_parts, captions_of, image_suffix
from ppcl_ds.data import images as pictures
from ppcl_ds.data.batch import Prompts
from ppcl_ds.data.encoders import ImageEncoder, TextEncoder, without_padding
from ppcl_ds.data.index import Member

BATCH = 32
"""Samples that go through the encoders together."""

_WINDOW = 8 * BATCH
"""Samples that are held at a time, so that those of one size meet in a batch."""


@dataclass
class Item:
    """A sample on its way.

    Attributes:
        name: `shard:key`.
        parts: what will be stored.
        captions: by name, the main one first.
        image: RGB, of a bucket's size.
        why: what speaks against the sample.
    """

    key: str
    name: str
    parts: dict[str, bytes] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    image: Image.Image | None = None
    why: str = ""


@dataclass
class Coder:
    """Both encoders at work on the samples of a shard."""

    images: ImageEncoder
    captions: TextEncoder
    buckets: pictures.Buckets
    keep_images: bool

    def items(self, stored: Iterator[tuple[Member, dict[str, bytes]]], shard_name: str) -> Iterator[Item]:
        """Samples in stored order, encoded, or with what speaks against it."""
        while window := list(islice(stored, _WINDOW)):
            items = [Item(member.key, f"{shard_name}:{member.key}") for member, _ in window]
            waiting: dict[tuple[int, int], list[Item]] = {}
            for item, (_, parts) in zip(items, window, strict=True):
                try:
                    item.captions = captions_of(parts)
                    item.image = self._fitted(parts)
                except ValueError as fault:
                    item.why = str(fault)
                    continue
                suffix = image_suffix(parts)
                item.parts = caption_parts(item.captions) | ({suffix: parts[suffix]} if self.keep_images else {})
                same_size = waiting.setdefault(item.image.size, [])
                same_size.append(item)
                if len(same_size) == BATCH:
                    self._encode(waiting.pop(item.image.size))
            for same_size in waiting.values():
                self._encode(same_size)
            yield from items

    def _fitted(self, parts: dict[str, bytes]) -> Image.Image:
        suffix = image_suffix(parts)
        if not suffix:
            raise ValueError("it has no image")
        try:
            return self.buckets.fit(pictures.as_rgb(pictures.decode(parts[suffix])))
        except ValueError as fault:
            raise ValueError(f"the {suffix} image {fault}") from None

    def _encode(self, items: list[Item]) -> None:
        """Give the items, pictures of one size, their tensors; their captions go through the encoder together."""
        latents = self.images.encode([item.image for item in items if item.image is not None])  # (B, C, H, W)
        texts = [text.strip() for item in items for text in item.captions.values()]
        prompts = [
            row
            for start in range(0, len(texts), BATCH)
            for row in _rows(self.captions.encode(texts[start : start + BATCH]))
        ]
        rows = iter(prompts)
        for latent, item in zip(latents, items, strict=True):
            tensors = {"latents": latent}
            for name in item.captions:
                tensors |= _prompt_tensors(next(rows), f".{name}" if len(tensors) > 1 else "")
            stored = _stored(tensors)
            bad = [name for name, tensor in stored.items() if not bool(tensor.isfinite().all())]
            if bad:
                item.why = f"NaN or infinity in its {', '.join(bad)}"
            item.parts["safetensors"] = safetensors.torch.save(stored)
            item.image = None


def _rows(prompts: Prompts) -> list[Prompts]:
    """Prompts one by one, as long as they are stored."""
    return [
        without_padding(
            replace(
                prompts,
                embeds=prompts.embeds[row : row + 1],
                mask=None if prompts.mask is None else prompts.mask[row : row + 1],
                pooled=None if prompts.pooled is None else prompts.pooled[row : row + 1],
            )
        )
        for row in range(len(prompts.embeds))
    ]


def _prompt_tensors(prompt: Prompts, name: str = "") -> dict[str, Tensor]:
    """A prompt with B = 1, as it is stored."""
    tensors = {f"prompt_embeds{name}": prompt.embeds[0]}
    return tensors if prompt.pooled is None else {**tensors, f"pooled{name}": prompt.pooled[0]}


def _stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def empty_caption(captions: TextEncoder) -> bytes:
    """The encoded empty caption, as a safetensors file."""
    (prompt,) = _rows(captions.encode([""]))
    return safetensors.torch.save(_stored(_prompt_tensors(prompt)))
