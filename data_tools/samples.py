"""One sample as it is stored: its members in a tar, its captions, the header of its image, the shapes of its tensors.

Captions have names, see `is_caption`. KEY.txt holds the main one, KEY.json, a JSON object, all of them where there are
several.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

import webdataset as wds
from PIL import Image

from ppcl_ds.atomic import fsync
from ppcl_ds.data import clips, images
from ppcl_ds.data.index import IMAGE_SUFFIXES, SUFFIXES, Member, scan
from ppcl_ds.errors import shown


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


SOURCE = "source."
"""The image that a pipeline is to edit lies beside the sample's own, as KEY.source.png."""


def image_suffix(parts: Mapping[str, Any], name: str = "") -> str:
    """Which member is the image or the clip, or the image called `name`; empty: none."""
    kinds = IMAGE_SUFFIXES if name else SUFFIXES
    return next((name + suffix for suffix in kinds if name + suffix in parts), "")


@contextmanager
def _named(suffix: str) -> Iterator[None]:
    try:
        yield
    except ValueError as fault:
        raise ValueError(f"the {suffix} {'clip' if clips.is_clip(suffix) else 'image'} {fault}") from None


def frames_of(parts: Mapping[str, bytes], suffix: str) -> Iterator[Image.Image]:
    """The frames of a sample's clip, or its image alone, RGB; each is decoded when it is asked for.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    with _named(suffix):
        if clips.is_clip(suffix):
            yield from clips.decode(parts[suffix])
        else:
            yield images.as_rgb(images.decode(parts[suffix]))


_LANGUAGES = (
    "aa|ab|ae|af|ak|am|an|ar|as|av|ay|az|ba|be|bg|bi|bm|bn|bo|br|bs|ca|ce|ch|co|cr|cs|cu|cv|cy|da|de|dv|dz|ee|el|"
    "en|eo|es|et|eu|fa|ff|fi|fj|fo|fr|fy|ga|gd|gl|gn|gu|gv|ha|he|hi|ho|hr|ht|hu|hy|hz|ia|ie|ig|ii|ik|io|is|it|iu|"
    "ja|jv|ka|kg|ki|kj|kk|kl|km|kn|ko|kr|ks|ku|kv|kw|ky|la|lb|lg|li|ln|lo|lt|lu|lv|mg|mh|mi|mk|ml|mn|mr|ms|mt|my|"
    "na|nb|nd|ne|ng|nl|nn|no|nr|nv|ny|oc|oj|om|or|os|pa|pi|pl|ps|pt|qu|rm|rn|ro|ru|rw|sa|sc|sd|se|sg|si|sk|sl|sm|"
    "sn|so|sq|sr|ss|st|su|sv|sw|ta|te|tg|th|ti|tk|tl|tn|to|tr|ts|tt|tw|ty|ug|uk|ur|uz|ve|vi|vo|wa|wo|xh|yi|yo|za|"
    "zh|zu"
)
"""ISO 639-1, without `id`: `caption_id` is a number far more often than Indonesian."""

_LANGUAGE = rf"({_LANGUAGES})([_-](hans|hant|latn|cyrl|arab|deva))?([_-][a-z]{{2}})?"
_CAPTION = re.compile(rf"(caption|text|prompt)([_-]{_LANGUAGE})?(_\d+)?", re.IGNORECASE)


def is_caption(name: str) -> bool:
    """Whether a column or a key of a JSON object holds captions: `caption`, `text`, `prompt`, `text_en`, `text_2`."""
    return bool(_CAPTION.fullmatch(name))


class NoCaptionError(ValueError):
    """There is nothing where a caption should be."""


def captions_in(content: Mapping[str, Any], columns: Sequence[str] = ()) -> dict[str, str]:
    """The captions of a row or of a JSON object by the names under which they are stored, the main one first.

    A list is several captions. Of several without names of their own the second is called `caption_2`.

    Args:
        content: value by column; captions that are not there may be None or NaN.
        columns: `data.caption_columns`.

    Raises:
        ValueError: there is none, or it cannot be stored; the message says why.
    """
    found: dict[str, str] = {}
    odd = ""
    for column in columns or filter(is_caption, content):
        value = content.get(column)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                found[_free(column if is_caption(column) else "caption", found)] = text
            elif text is not None and text == text:  # NaN is not
                odd = f"its `{shown(column, 60)}` is {kind_of(text)}, not a text or a list of texts"
    if odd and not any(text.strip() for text in found.values()):
        raise NoCaptionError(odd)
    return _that_can_be_stored(found, main_first=not columns)


def together(captions: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """All captions of an image that stands in several rows, each text once."""
    found: dict[str, str] = {}
    for row in captions:
        for name, text in row.items():
            if text not in found.values():
                found[_free(name, found)] = text
    return found


def captions_of(parts: Mapping[str, bytes], columns: Sequence[str] = ()) -> dict[str, str]:
    """All captions of a sample by name, the main one first.

    KEY.txt is the main one. Its name is the one that KEY.json gives to the same text, or `caption`.

    Args:
        parts: content by suffix.
        columns: `data.caption_columns`, of a sample that is not stored yet.

    Raises:
        ValueError: it has none, or they cannot be read; the message says why.
    """
    captions = _from_json(parts, columns) if "json" in parts else {}
    if "txt" not in parts:
        return captions or _that_can_be_stored({})
    try:
        text = parts["txt"].decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("its caption (.txt) is not UTF-8") from None
    if not text.strip():
        return captions or _that_can_be_stored({"txt": ""})
    name = next((name for name, other in captions.items() if other == text), "")
    name = name or ("txt" if "caption" in captions else "caption")
    return _that_can_be_stored({name: text} | captions, main_first=False)


def kind_of(value: object) -> str:
    """What a value is, for messages; never the value itself."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
        list: "a list",
        bytes: "bytes",
    }
    return "missing" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def _that_can_be_stored(captions: Mapping[str, str], main_first: bool = True) -> dict[str, str]:
    said = {name: text for name, text in captions.items() if text.strip()}
    if not said:
        raise NoCaptionError("its caption is empty" if captions else "it has no caption")
    for name, text in said.items():
        if "\0" in text:
            raise ValueError(f"its caption `{name}` has NUL characters; is it UTF-16?")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"its caption `{name}` is not UTF-8") from None
    return {name: said[name] for name in sorted(said, key=lambda name: main_first and name != "caption")}


def _free(name: str, taken: Container[str]) -> str:
    """The name, or, where it is taken, the next with a number: `text_2`."""
    stem = re.sub(r"_\d+$", "", name)
    return next(free for free in chain([name], (f"{stem}_{n}" for n in count(2))) if free not in taken)


def caption_parts(captions: Mapping[str, str]) -> dict[str, bytes]:
    """Captions, the main one first, as they are stored: `txt`, and `json` where there are several."""
    parts = {"txt": next(iter(captions.values())).encode()}
    if len(captions) > 1:
        parts["json"] = json.dumps(captions, ensure_ascii=False).encode()
    return parts


def header_of(parts: Mapping[str, bytes], suffix: str) -> clips.Header:
    """Size, mode and frames of an image or a clip, nothing of it decoded.

    Raises:
        ValueError: it has none; the message names it and says why.
    """
    with _named(suffix):
        if clips.is_clip(suffix):
            return clips.header(parts[suffix])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = images.open_header(parts[suffix])
        return clips.Header(image.width, image.height, image.mode, 1)


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
    """Shape of a sample's latents, as in `16x128x96`, or with frames `16x1x128x96`; `0x128x96`: it is a caption alone.

    Raises:
        ValueError: it has no latents of three or four dimensions.
    """
    shape = shapes.get("latents")
    if shape is None or len(shape) not in (3, 4) or not math.prod(shape[1:]):
        raise ValueError("no tensor `latents`" if shape is None else f"latents of shape {shape}, not C (x F) x H x W")
    return "x".join(map(str, shape))


def _from_json(parts: Mapping[str, bytes], columns: Sequence[str]) -> dict[str, str]:
    needed = "txt" not in parts
    try:
        content = json.loads(parts["json"])
    except (ValueError, RecursionError):
        raise ValueError("its .json is damaged") from None
    if not isinstance(content, dict):
        if needed:
            raise ValueError("its .json is not a JSON object")
        return {}
    if "safetensors" in parts:  # encoded: there is nothing else in it
        return _that_can_be_stored({name: text for name, text in content.items() if isinstance(text, str)})
    try:
        return captions_in(dict(sorted(content.items())), columns)
    except NoCaptionError:
        if needed:
            raise
        return {}
