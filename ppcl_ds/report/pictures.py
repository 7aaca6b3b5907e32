"""The page's section of pictures: teacher and variants on the same noise, large enough to be looked at."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ppcl_ds.evaluate.report import Pictures, read_pictures
from ppcl_ds.units.plan import UNDISTILLED

_SHOWN = 8
"""Prompts, at most."""
_SIDE = 768
"""Pixels of a picture on the page, at most."""
_COARSE = 96
"""Up to so many pixels a picture is kept as it is, and its pixels are shown as squares."""


@dataclass(frozen=True)
class Shown:
    """A picture as the page holds it."""

    model: str
    source: str
    coarse: bool


@dataclass(frozen=True)
class Prompt:
    """The pictures of one prompt: of the models one would use, and of those that were not trained."""

    text: str
    models: Sequence[Shown]
    untrained: Sequence[Shown]


def section(run: Path, models: Sequence[str]) -> list[Prompt]:
    """The first pictures of an evaluation; none where there are none one by one.

    Args:
        models: in the order of the page.
    """
    pictures: Pictures = read_pictures(run)
    names = [name for name in models if name in pictures.files]
    found = []
    for number, text in enumerate(pictures.captions[:_SHOWN]):
        every = [picture(pictures.files[name][number], name) for name in names if number < len(pictures.files[name])]
        shown = [each for each in every if each]
        used = [each for each in shown if not each.model.endswith(UNDISTILLED)]
        found.append(Prompt(text.strip(), used, [each for each in shown if each.model.endswith(UNDISTILLED)]))
    return found


def picture(path: Path, model: str) -> Shown | None:
    """A picture as the page holds it in itself: as it is where it is small, else at most 768 pixels a side, as JPEG.

    None where it is gone or damaged.
    """
    try:
        with Image.open(path) as opened:
            coarse, buffer = max(opened.size) <= _COARSE, io.BytesIO()
            image = opened.copy() if coarse else opened.convert("RGB")
    except OSError:
        return None
    if not coarse:
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    image.save(buffer, "PNG" if coarse else "JPEG", quality=88)
    kind = "png" if coarse else "jpeg"
    return Shown(model, f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", coarse)
