"""Pictures side by side in one PNG, pixel for pixel, each above its prompt."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_LEAST = 128
"""Smaller pictures are enlarged to about this width, by a whole number, so that they can be seen."""
_GAP, _TEXT = 8, 12
"""Pixels between columns, and of the letters' height."""


def as_image(picture: Tensor) -> Image.Image:
    """A picture (C, H, W) in [-1, 1], C = 1 or 3, as diffusers would save it."""
    values = ((picture.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().byte()  # (C, H, W)
    return Image.fromarray(values.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def as_columns(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> bytes:
    """One row of pictures of one size, their prompts below, as a PNG."""
    factor = max(1, _LEAST // pictures[0].width)
    width, height = (side * factor for side in pictures[0].size)
    # matplotlib's own font is there on every machine.
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _TEXT)
    texts = ["\n".join(textwrap.wrap(prompt, int(width / font.getlength("e")))) for prompt in prompts]
    lines = max(1 + text.count("\n") for text in texts)
    size = (len(pictures) * (width + _GAP) - _GAP, height + _GAP + lines * (_TEXT + 4))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for column, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left = column * (width + _GAP)
        page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, 0))
        pen.multiline_text((left, height + _GAP // 2), text, fill="black", font=font, spacing=2)
    buffer = io.BytesIO()
    page.save(buffer, format="PNG")
    return buffer.getvalue()
