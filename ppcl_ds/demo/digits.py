"""The demo's data: scikit-learn's 1,797 real handwritten digits as small images with captions, no download needed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from ppcl_ds.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The word of each digit, 0 to 9."""

TEMPLATES = ("{}", "the digit {}", "a handwritten {}", "a picture of the digit {}")
"""Captions of different lengths, so that batches hold padding and the text mask matters."""

_GREYS = 16
"""The scanner counted ink in 4 x 4 squares: every pixel is a whole number from 0 to 16."""


@lru_cache
def real_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All real digits: images (1797, 64) with pixels in [-1, 1], row by row, and their labels (1797,)."""
    pixels, labels = load_digits(return_X_y=True)
    return pixels / (_GREYS / 2) - 1.0, labels


def write_images(folder: Path) -> None:
    """Write every digit as `0000-zero.png` (8 x 8, grey) and its caption as `0000-zero.txt`; skip what is there.

    Greys 0..16 become 0..255, far enough apart that rounding gives each of them back.
    """
    images, labels = real_digits()
    names = [f"{index:04d}-{WORDS[label]}" for index, label in enumerate(labels)]
    folder.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in folder.iterdir()}
    captions = _captions(len(labels))
    for name, image, label, caption in zip(names, images, labels, captions, strict=True):
        if f"{name}.txt" in present:  # written last, so an image is there too
            continue
        greys = np.rint((image + 1.0) * 127.5).astype(np.uint8)
        Image.fromarray(greys.reshape(8, 8), mode="L").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption.format(WORDS[label]) + "\n")


def write_captions(path: Path) -> None:
    """Write a caption for every digit, a line each; no images."""
    labels = real_digits()[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in digit_captions(labels)))


def digit_captions(labels: NDArray[np.int64]) -> list[str]:
    """The caption of every digit."""
    return [caption.format(WORDS[label]) for caption, label in zip(_captions(len(labels)), labels, strict=True)]


def _captions(count: int) -> list[str]:
    """A template for every sample, always the same ones."""
    return [TEMPLATES[choice] for choice in np.random.RandomState(0).randint(len(TEMPLATES), size=count)]


def digit_in(caption: str) -> int:
    """The digit that `caption` asks for.

    Raises:
        UserError: no digit word in it, or more than one.
    """
    found = [WORDS.index(word) for word in caption.split() if word in WORDS]
    if len(found) != 1:
        raise UserError(f"caption '{caption}' must name one digit in words, such as 'a handwritten {WORDS[7]}'")
    return found[0]
