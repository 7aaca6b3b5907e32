"""The demo's data: scikit-learn's 1,797 real handwritten digits as small images with captions, no download needed."""

from __future__ import annotations

from functools import lru_cache

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


def samples() -> list[tuple[str, Image.Image, str]]:
    """Every digit: a name such as `0000-zero`, its picture (8 x 8, grey) and its caption, always the same one.

    Greys 0..16 become 0..255, far enough apart that rounding gives each of them back.
    """
    images, labels = real_digits()
    greys = np.rint((images + 1.0) * 127.5).astype(np.uint8).reshape(-1, 8, 8)
    chosen = np.random.RandomState(0).randint(len(TEMPLATES), size=len(labels))
    return [
        (f"{index:04d}-{WORDS[label]}", Image.fromarray(grey, mode="L"), TEMPLATES[choice].format(WORDS[label]))
        for index, (grey, label, choice) in enumerate(zip(greys, labels, chosen, strict=True))
    ]


def digit_in(caption: str) -> int:
    """The digit that `caption` asks for.

    Raises:
        UserError: no digit word in it, or more than one.
    """
    found = [WORDS.index(word) for word in caption.split() if word in WORDS]
    if len(found) != 1:
        raise UserError(f"caption '{caption}' must name one digit in words, such as 'a handwritten {WORDS[7]}'")
    return found[0]
