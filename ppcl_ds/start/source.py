"""A first look at a source: how large its first images and clips are. What is wrong in it, `ppcl-data shard` says."""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from webdataset.shardlists import expand_urls

from ppcl_ds.data import clips
from ppcl_ds.data.images import open_header
from ppcl_ds.data.index import CLIP_SUFFIXES, IMAGE_SUFFIXES, SUFFIXES
from ppcl_ds.errors import UserError, brief, missing, shown

LOOKED = 256
"""Images and clips that are looked at."""

_HEADER = 1 << 16
"""Bytes of a file that most headers lie in."""

_CAPTIONS = (".txt", ".json")
_TABLES = (".jsonl", ".csv", ".parquet")

Seen = tuple[int, int, int]
"""Width and height in pixels, and frames: 1 of an image, 0 of a caption alone."""

_CAPTION = (0, 0, 0)


@dataclass(frozen=True)
class Look:
    """What the first images and clips of a source are like.

    Attributes:
        images: their sizes, at most `LOOKED`; none of a source that was not looked at, as it has to be fetched.
        captions: whether there are captions alone.
    """

    images: tuple[Seen, ...]
    captions: bool = False

    @property
    def noun(self) -> str:
        """What most of them are, as a word."""
        return "clips" if 2 * len(self._clips) > len(self.images) else "images"

    @property
    def frames(self) -> int | None:
        """Nine in ten of its clips have at least so many; None: there is no clip."""
        return self._clips[len(self._clips) // 10] if self._clips else None

    @property
    def _clips(self) -> list[int]:
        return sorted(frames for _, _, frames in self.images if frames > 1)

    @property
    def samples(self) -> int | None:
        """How many there are in all; None: nobody has counted."""
        return len(self.images) if 0 < len(self.images) < LOOKED else None

    @property
    def side(self) -> int | None:
        """Nine in ten of them have at least side x side pixels; None: nobody knows."""
        pixels = sorted(width * height for width, height, _ in self.images)
        return math.isqrt(pixels[len(pixels) // 10]) if pixels else None

    @property
    def squares(self) -> bool:
        """Whether nine in ten of them are squares, or nearly."""
        oblong = sum(max(sides) > 1.1 * min(sides) for *sides, _ in self.images)
        return bool(self.images) and oblong <= len(self.images) // 10


def look(source: str) -> Look:
    """Read the headers of the first images and clips of a source.

    Raises:
        UserError: it is none; the message says what one is.
    """
    if re.match(r"pipe:|\w+://", source):
        return Look(())
    if all(path.suffix.lower() == ".txt" for path in _paths(source)):
        return Look((), captions=True)
    every = (seen for path in _paths(source) for seen in _sizes(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        seen = tuple(islice(every, LOOKED))
    images = tuple(each for each in seen if each != _CAPTION)
    if seen and not images:
        return Look((), captions=True)
    if not images:
        raise UserError(
            f"source {shown(source)}: no image ({', '.join(IMAGE_SUFFIXES[:3])}, ...) or clip "
            f"({', '.join(CLIP_SUFFIXES[:3])}, ...) with a caption was found in it; "
            "beside NAME.png lies NAME.txt, or a table names both (docs/data.md)"
        )
    return Look(images)


def _paths(source: str) -> Iterator[Path]:
    """The files or the folder that it names."""
    if Path(source).exists():
        yield Path(source)
        return
    try:
        names = list(expand_urls(source))
    except ValueError as fault:
        raise UserError(f"source {shown(source)}: {brief(fault)}") from None
    for name in names:
        for path in map(Path, sorted(glob.glob(name)) or [name]):
            if not path.exists():
                raise UserError(f"source {missing(path)}")
            yield path


def _sizes(path: Path) -> Iterator[Seen]:
    kind = path.suffix.lower()
    if path.is_dir():
        return _in_folder(path)
    if kind == ".tar":
        return _in_tar(path)
    if kind in _TABLES:
        return _in_table(path)
    raise UserError(f"source {shown(path)}: neither a folder, nor a table ({', '.join(_TABLES)}), nor a shard (.tar)")


def _in_folder(top: Path) -> Iterator[Seen]:
    for folder, below, names in os.walk(top, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith((".", "__MACOSX")))
        captioned = {name.lower()[: -len(each)] for name in names for each in _CAPTIONS if name.lower().endswith(each)}
        for name in (name for name in below if name.lower() in captioned):
            yield from _in_frames(Path(folder, name))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            kind = path.suffix.lower()
            if kind == ".tar" or kind == ".parquet" or name in ("metadata.jsonl", "metadata.csv"):
                yield from _sizes(path)
            elif kind[1:] in SUFFIXES and path.stem.lower() in captioned:
                yield from _in_file(path)


def _in_tar(path: Path) -> Iterator[Seen]:
    kinds = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                kinds.add(kind := Path(member.name).suffix.lower()[1:])
                file = tar.extractfile(member) if kind in SUFFIXES else None
                if file:
                    yield from _size(file, kind)
        if kinds.isdisjoint(SUFFIXES) and {f".{kind}" for kind in kinds}.intersection(_CAPTIONS):
            yield _CAPTION
    except (tarfile.TarError, OSError) as fault:
        raise UserError(f"source {shown(path)}: it cannot be read ({brief(fault)})") from None


def _in_table(path: Path) -> Iterator[Seen]:
    """Of a row the first value that is an image, or the path of one or of a clip; of one of texts, a caption."""
    read = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}[path.suffix.lower()]
    try:
        for row in islice(read(path), LOOKED):
            found = list(islice((size for value in row for size in _in_value(value, path.parent)), 1))
            yield from found or ([] if any(map(_is_of_an_image, row)) or not any(row) else [_CAPTION])
    except (OSError, ValueError, csv.Error) as fault:  # pyarrow's own are of these
        raise UserError(f"source {shown(path)}: it cannot be read ({brief(fault)})") from None


def _json_lines(path: Path) -> Iterator[list[Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for line in filter(str.strip, file):
            with suppress(ValueError):  # `ppcl-data shard` names it
                row = json.loads(line)
                yield list(row.values()) if isinstance(row, dict) else []


def _csv(path: Path) -> Iterator[list[Any]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from islice(csv.reader(file), 1, None)


def _parquet(path: Path) -> Iterator[list[Any]]:
    import pyarrow.parquet  # takes a while

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(16):
            yield from (list(row.values()) for row in batch.to_pylist())


def _is_of_an_image(value: Any) -> bool:
    return isinstance(value, dict | bytes) or (isinstance(value, str) and Path(value).suffix.lower()[1:] in SUFFIXES)


def _in_value(value: Any, folder: Path) -> Iterator[Seen]:
    if isinstance(value, dict):  # Hugging Face's images: bytes, a path, or both
        yield from islice((size for each in value.values() for size in _in_value(each, folder)), 1)
    elif isinstance(value, bytes):
        yield from _size(io.BytesIO(value), "")
    elif isinstance(value, str) and "\0" not in value:
        if _is_of_an_image(value):
            yield from _in_file(folder / value)
        else:
            yield from _in_frames(folder / value)


def _in_frames(folder: Path) -> Iterator[Seen]:
    """Of a folder whose files are the frames of a clip."""
    with suppress(OSError):  # most often, no folder
        names = sorted(name for name in os.listdir(folder) if Path(name).suffix.lower()[1:] in IMAGE_SUFFIXES)
        for width, height, _ in _in_file(folder / names[0]) if names else ():
            yield width, height, len(names)


def _in_file(path: Path) -> Iterator[Seen]:
    with suppress(OSError), path.open("rb") as file:
        yield from _size(file, path.suffix.lower()[1:])


def _size(file: BinaryIO | Any, kind: str) -> Iterator[Seen]:
    """Of an image or a clip; nothing where there is none, which `ppcl-data shard` names."""
    if kind in CLIP_SUFFIXES:
        with suppress(ValueError):
            width, height, _, frames = clips.glance(file)
            yield width, height, frames
        return
    for most in (_HEADER, -1):
        file.seek(0)
        with suppress(ValueError):
            yield *open_header(file.read(most)).size, 1
            return
