"""One sample as it is stored: its members in a tar, its captions, the header of its picture, the shapes of its tensors.

Captions have names: `caption`, `text`, `prompt`, or `caption_` and more. KEY.txt holds the main one, KEY.json, a JSON
object, all of them where there are several.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import webdataset as wds
from PIL import Image

from ppcl_ds.atomic import fsync
from ppcl_ds.data.images import FORMATS
from ppcl_ds.data.index import IMAGE_SUFFIXES, Member, scan
from ppcl_ds.errors import brief


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write a shard, whole or not at all; equal samples give equal bytes.

    Args:
        path: the tar.
        samples: key, and what each suffix holds.
    """
    partial = path.with_name(path.name + ".partial")
    write_partial(partial, samples)
    os.replace(partial, path)


def write_partial(partial: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write a shard that gets its name later; else as `write_tar`."""
    with partial.open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as writer:
        for key, parts in samples:
            writer.write({"__key__": key, **parts})
    fsync(partial)


def members_of(path: Path) -> list[Member]:
    """The samples of a shard that was just written."""
    with path.open("rb") as file:
        members, problems = scan(file)
    assert not problems, problems
    return members


def read_parts(file: BinaryIO, member: Member) -> dict[str, bytes]:
    """What each suffix of a sample holds."""
    parts = {}
    for suffix, (start, length) in member.parts.items():
        file.seek(start)
        parts[suffix] = file.read(length)
    return parts


def image_suffix(parts: Mapping[str, Any]) -> str:
    """Which member is the picture; empty: none."""
    return next((suffix for suffix in IMAGE_SUFFIXES if suffix in parts), "")


def is_caption(name: str) -> bool:
    """Whether a column or a key of a JSON object holds captions."""
    return name in ("caption", "text", "prompt") or name.startswith("caption_")


def captions_of(parts: Mapping[str, bytes]) -> dict[str, str]:
    """All captions of a sample by name, the main one first.

    KEY.txt is the main one. Its name is the one that KEY.json gives to the same text, or `caption`.

    Raises:
        ValueError: it has none, or they cannot be read; the message says why.
    """
    captions = _from_json(parts["json"], strict="txt" not in parts) if "json" in parts else {}
    if "txt" not in parts:
        return main_first(captions)
    try:
        text = parts["txt"].decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("its caption (.txt) is not UTF-8") from None
    if not text.strip():
        return main_first(captions or {"txt": ""})
    name = next((name for name, other in captions.items() if other == text), "")
    name = name or ("txt" if "caption" in captions else "caption")
    return {name: text} | captions


def main_first(captions: Mapping[str, str]) -> dict[str, str]:
    """Captions that say something, `caption` first, the others in the order they came.

    Raises:
        ValueError: there is none, or it cannot be stored as UTF-8.
    """
    said = {name: text for name, text in captions.items() if text.strip()}
    if not said:
        raise ValueError("its caption is empty" if captions else "it has no caption")
    for name, text in said.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"its caption `{name}` is not UTF-8") from None
    return {name: said[name] for name in sorted(said, key=lambda name: name != "caption")}


def caption_parts(captions: Mapping[str, str]) -> dict[str, bytes]:
    """Captions, the main one first, as they are stored: `txt`, and `json` where there are several."""
    parts = {"txt": next(iter(captions.values())).encode()}
    if len(captions) > 1:
        parts["json"] = json.dumps(captions, ensure_ascii=False).encode()
    return parts


def picture_header(data: bytes) -> tuple[int, int, str]:
    """Width, height and mode of a picture, from its header alone.

    Raises:
        ValueError: it has none; the message says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            return image.width, image.height, image.mode
    except Exception as fault:  # PIL raises whatever the broken byte led to
        why = brief(fault)
        known = "cannot identify" in why
        raise ValueError(f"is no picture in {', '.join(FORMATS)}" if known else f"cannot be read: {why}") from None


def tensor_shapes(data: bytes) -> dict[str, list[int]]:
    """Shapes of the tensors of a safetensors file, from its header alone; its first bytes are enough.

    Raises:
        ValueError: it is no such file.
    """
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("its .safetensors has no header") from None
    if not all(isinstance(shape, list) and all(isinstance(n, int) for n in shape) for shape in shapes.values()):
        raise ValueError("its .safetensors has no header")
    return shapes


def header_length(data: bytes) -> int:
    """How many bytes of a safetensors file, whose first 8 are given, hold its header."""
    return 8 + min(int.from_bytes(data[:8], "little"), 10**8)


def latent_shape(shapes: Mapping[str, list[int]]) -> str:
    """Shape of a sample's latents, as in `16x128x96`.

    Raises:
        ValueError: it has no latents of three dimensions.
    """
    shape = shapes.get("latents")
    if shape is None or len(shape) != 3 or not math.prod(shape):
        raise ValueError("no tensor `latents`" if shape is None else f"latents of shape {shape}, not C x H x W")
    return "x".join(map(str, shape))


def _from_json(data: bytes, strict: bool) -> dict[str, str]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("its .json is damaged") from None
    if not isinstance(content, dict):
        if strict:
            raise ValueError("its .json is not a JSON object")
        return {}
    found = {name: text for name, text in sorted(content.items()) if is_caption(name) and isinstance(text, str)}
    return main_first(found) if any(text.strip() for text in found.values()) else found
