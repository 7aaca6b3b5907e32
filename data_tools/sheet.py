"""Contact sheets: samples of some shards with their captions, as an HTML page or one PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import jinja2
import matplotlib
import numpy as np
import safetensors.torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data_tools.samples import captions_of, frames_of, image_suffix, read_parts
from ppcl_ds.atomic import atomic_write
from ppcl_ds.data.index import scan
from ppcl_ds.errors import brief

_SIDE = 160
"""Pixels of a thumbnail's longest side."""

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 13px/1.35 system-ui, sans-serif; margin: 1.5em; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 1.2em }
figure { margin: 0; overflow-wrap: anywhere } img { max-width: 100%; image-rendering: pixelated }
figcaption b { color: #777; font-weight: normal }
</style>
<h1>{{ title }}</h1><p>{{ note }}</p>
<main>
{% for card in cards %}
<figure><img src="data:image/png;base64,{{ card.png }}" alt="{{ card.name }}">
<figcaption><b>{{ card.name }}</b>
{% for name, text in card.captions.items() %}<div><b>{{ name }}:</b> {{ text }}</div>{% endfor %}
</figcaption></figure>
{% endfor %}
</main></html>
"""


@dataclass(frozen=True)
class Card:
    """One sample on the sheet."""

    name: str
    captions: dict[str, str]
    image: Image.Image
    latent: bool

    @property
    def png(self) -> str:
        """The thumbnail in base64."""
        file = io.BytesIO()
        self.image.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()


def write_sheet(path: Path, shards: Sequence[tuple[Path, int]], count: int) -> str:
    """Write a contact sheet of `count` samples, evenly spread.

    Args:
        path: `.html` or `.png`.
        shards: the tars, and how many samples each has.
        count: images on the sheet; all, where there are fewer.

    Returns:
        What can be seen on it.
    """
    cards = _cards(shards, count)
    note = f"{len(cards)} samples"
    if latents := sum(card.latent for card in cards):
        note += f"; {latents} of them are latents: their first three channels, each from its least to its largest value"
    if path.suffix.lower() == ".html":
        page = jinja2.Environment(autoescape=True).from_string(_PAGE)
        atomic_write(path, page.render(title=str(shards[0][0].parent), note=note, cards=cards))
    else:
        file = io.BytesIO()
        _grid(cards).save(file, "PNG")
        atomic_write(path, file.getvalue())
    return note


def _cards(shards: Sequence[tuple[Path, int]], count: int) -> list[Card]:
    total = sum(samples for _, samples in shards)
    wanted = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)) if total else np.array([], int)
    cards, start = [], 0
    for path, samples in shards:
        own = wanted[(wanted >= start) & (wanted < start + samples)] - start
        start += samples
        if not len(own):
            continue
        with path.open("rb") as file:
            members, _ = scan(file)
            cards += [_card(f"{path.name}:{members[n].key}", read_parts(file, members[n])) for n in own]
    return cards


def _card(name: str, parts: dict[str, bytes]) -> Card:
    try:
        captions = captions_of(parts)
    except ValueError as fault:
        captions = {"": f"({brief(fault)})"}
    suffix = image_suffix(parts)
    try:
        image = next(frames_of(parts, suffix)) if suffix else _latent(parts["safetensors"])
    except Exception as fault:  # a damaged sample has its place on the sheet, and a grey square
        return Card(name, {**captions, "": f"({brief(fault)})"}, Image.new("RGB", (_SIDE, _SIDE), "#ccc"), not suffix)
    if max(image.size) < _SIDE // 2:
        scale = _SIDE // max(image.size)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    return Card(name, captions, ImageOps.contain(image, (_SIDE, _SIDE)), not suffix)


def _latent(data: bytes) -> Image.Image:
    """The first three channels of (C, H, W) or (C, F, H, W) latents as colours; one channel as grey."""
    latents = safetensors.torch.load(data)["latents"].float().numpy()
    latents = latents[:, 0] if latents.ndim == 4 else latents  # (C, H, W)
    shown = latents[:3] if len(latents) >= 3 else latents[[0, 0, 0]]  # (3, H, W)
    low, high = (f(shown, axis=(1, 2), keepdims=True) for f in (np.nanmin, np.nanmax))
    scaled = np.nan_to_num((shown - low) / np.maximum(high - low, 1e-6)).clip(0, 1)
    return Image.fromarray((scaled * 255).round().astype(np.uint8).transpose(1, 2, 0))


def _grid(cards: Sequence[Card]) -> Image.Image:
    columns = max(1, min(8, len(cards)))
    width, height = _SIDE + 16, _SIDE + 90
    sheet = Image.new("RGB", (columns * width, max(1, -(-len(cards) // columns)) * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 10)
    for number, card in enumerate(cards):
        left, top = number % columns * width + 8, number // columns * height + 8
        sheet.paste(card.image, (left + (_SIDE - card.image.width) // 2, top))
        text = [card.name, *(line for caption in card.captions.values() for line in wrap(caption, 27))]
        draw.multiline_text((left, top + _SIDE + 4), "\n".join(line[:27] for line in text[:6]), "black", font)
    return sheet
