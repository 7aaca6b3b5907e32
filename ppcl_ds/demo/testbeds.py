"""The demo's testbeds: what there is to draw, and the pipeline that a teacher is trained in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppcl_ds.data.images import as_rgb
from ppcl_ds.demo import digits, emoji
from ppcl_ds.demo.cosines import CosineVae
from ppcl_ds.demo.pipeline import DigitsPipeline, EmojiPipeline, PixelVae, WordTable

Sample = tuple[str, Image.Image, str]
"""A picture's name, the picture, and its caption."""


@dataclass(frozen=True)
class Testbed:
    """What a recipe's `demo.data` names.

    Attributes:
        samples: all of them, always the same.
        pipeline: its class.
        parts: what a pipeline is made of beside scheduler and transformer, from the transformer's configuration.
        fetch: downloads what is needed, unless it is there.
    """

    samples: Callable[[], list[Sample]]
    pipeline: type[DigitsPipeline]
    parts: Callable[[Any], dict[str, Any]]
    fetch: Callable[[], None] = lambda: None


TESTBEDS = {
    "digits": Testbed(
        digits.samples,
        DigitsPipeline,
        lambda config: {
            "vae": PixelVae(config.in_channels // 4),
            "text_encoder": WordTable(config.joint_attention_dim),
        },
    ),
    "emoji": Testbed(emoji.samples, EmojiPipeline, lambda config: {"vae": CosineVae(), **emoji.encoder()}, emoji.fetch),
}
"""By name."""


def write_images(testbed: Testbed, folder: Path) -> None:
    """Write every sample as `NAME.png` and its caption as `NAME.txt`; skip what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in folder.iterdir()}
    for name, image, caption in testbed.samples():
        if f"{name}.txt" in present:  # written last, so an image is there too
            continue
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n")


def write_captions(testbed: Testbed, path: Path) -> None:
    """Write every sample's caption, a line each; no images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{caption}\n" for _, _, caption in testbed.samples()))


def read_samples(testbed: Testbed) -> tuple[Tensor, list[str]]:
    """All pictures, (N, 3, H, W) float32 in [-1, 1], and their captions."""
    samples = testbed.samples()
    return as_tensor([image for _, image, _ in samples]), [caption for _, _, caption in samples]


def as_tensor(images: list[Image.Image]) -> Tensor:
    """Pictures of one size as (N, 3, H, W) float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(as_rgb(image)) for image in images])  # (N, H, W, 3) uint8
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
