"""What lies in a folder of shards: every sample's place in its tar, and what is damaged there.

A shard is a tar in webdataset's conventions: members `KEY.SUFFIX`, those of one sample side by side.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ValidationError
from webdataset.tariterators import base_plus_ext

from ppcl_ds.atomic import atomic_write, sha256
from ppcl_ds.errors import UserError, brief, shown
from ppcl_ds.sections import Data

IMAGE_SUFFIXES = (
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl",
)  # fmt: skip
"""Kinds of images that are read; the last part of a file name, in lower case."""

CLIP_SUFFIXES = ("mp4", "mov", "mkv", "webm", "frames")
"""Kinds of clips; `frames` is a tar of images."""

SUFFIXES = IMAGE_SUFFIXES + CLIP_SUFFIXES
"""What a sample can be of."""

SIZE = "size"
"""Of a caption without an image, KEY.size says at which size it is drawn: `1024x1024`, or `480x832x81` with frames."""

_META = re.compile(r"__[^/]*__($|/)|(.*/)?(\.(?!\.?(/|$))|__MACOSX(/|$))")
"""Members that are passed over: webdataset's own, and hidden ones, such as macOS writes beside every file."""

_LONGEST_KEY = 4096
"""Characters of a key; as in messages, what is no character is escaped."""

_BLOCK = 512
"""A tar is made of blocks of so many bytes; two of them, all zeros, close it."""


class ShardEntry(BaseModel):
    """One shard of a folder."""

    name: str
    samples: int
    size: int
    """Length of the file in bytes."""
    sha256: str
    offsets: list[int]
    """Where each sample begins in the file, in bytes; it ends where the next one begins."""
    shapes: dict[str, list[int]] = {}
    """Of an encoded shard: latent shape, such as `16x128x96`, -> numbers of the samples that have it."""
    raw_sha256: str = ""
    """Of an encoded shard: the sha256 of the raw shard that it was made from."""

    def is_in(self, folder: Path) -> bool:
        """Whether the shard lies in `folder`, at its full length.

        The length matters: a tar that was cut between two samples reads as a shorter, whole one.
        """
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.size


class Index(BaseModel):
    """The `index.json` of a folder of shards; it is written last, so a folder that has one is whole."""

    shards: list[ShardEntry]
    settings: dict[str, Any] = {}
    """The recipe values that the shards were made with; where they differ now, the shards are made again."""
    skipped: list[str] = []
    """Samples that could not be used and are not in the shards: `file or shard:key: why`."""

    @property
    def samples(self) -> int:
        return sum(entry.samples for entry in self.shards)

    @staticmethod
    def read(path: Path, command: str) -> Index:
        """Read an index file.

        Args:
            path: the `index.json`.
            command: what writes it, for the message.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            return Index.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path} is missing; run `{command} RECIPE` first") from None
        except ValidationError:
            raise UserError(f"{path} is damaged; delete {path.parent} and run `{command} RECIPE`") from None

    def write(self, path: Path) -> None:
        """Write an index file, whole or not at all; one line a shard, so that it can be read and compared."""
        lines = ",\n".join(entry.model_dump_json() for entry in self.shards)
        rest = self.model_dump_json(exclude={"shards"}).removeprefix("{")
        atomic_write(path, f'{{"shards": [\n{lines}\n],\n{rest}\n')


def split_entries(data: Data, split: Literal["train", "heldout"]) -> list[ShardEntry]:
    """What the index says of the encoded shards of one split.

    Raises:
        UserError: nothing is encoded yet, a listed shard is missing or cut short, or the split is empty.
    """
    folder = data.shards / "encoded"
    index = Index.read(folder / "index.json", "ppcl-data encode")
    entries = [entry for entry in index.shards if entry.name.startswith(f"{split}-")]
    if not sum(entry.samples for entry in entries):
        raise UserError(f"{data.shards}: no {split} samples; set `data.heldout` and run `ppcl-data shard` and `encode`")
    for entry in entries:
        if not data.address and not entry.is_in(folder):
            raise UserError(f"{folder / entry.name} is missing or cut short; run `ppcl-data encode RECIPE`")
    return entries


def digest(entries: Sequence[ShardEntry]) -> str:
    """What tells apart two lists of shards: other shards, or other contents, give other samples in another order."""
    return hashlib.sha256("".join(entry.sha256 for entry in entries).encode()).hexdigest()


@dataclass(frozen=True)
class Member:
    """A sample as it lies in a tar.

    Attributes:
        key: its name.
        offset: where it begins, in bytes.
        parts: suffix -> where its content begins, and how long it is.
    """

    key: str
    offset: int
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def lacks(self, captions: bool) -> str:
        """What is missing from a sample that can be used; empty: nothing.

        Args:
            captions: whether captions can be used alone.
        """
        if "safetensors" in self.parts:
            return "" if "txt" in self.parts else "no caption (.txt)"
        kinds = {suffix.rpartition(".")[2] for suffix in self.parts}  # others than us have names such as KEY.front.jpg
        if not captions and not kinds & {*SUFFIXES, SIZE}:
            return f"no image (.{', .'.join(SUFFIXES)})"
        return "" if kinds & {"txt", "json"} else "no caption (.txt or .json)"


def scan(file: BinaryIO, closed: bool = True, captions: bool = False) -> tuple[list[Member], list[str]]:
    """Find the samples of a tar, and say what is wrong with the rest of it. Only headers are read.

    After a damaged place the search goes on at the next whole header, so a damaged header costs its own sample alone.

    Args:
        file: an open tar, uncompressed; need not be whole.
        closed: whether it must end as a tar ends, which a part cut out of one does not.
        captions: whether captions can be used alone.

    Returns:
        Samples that can be used, in stored order, and problems, `key: why` or `byte N: why`.
    """
    size = file.seek(0, os.SEEK_END)
    found: dict[str, Member] = {}
    bad: dict[str, str] = {}
    last, end = "", 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            for entry in tar:
                name = entry.name.removeprefix("./")
                if not _all_zeros(file, end, entry.offset):
                    # What lay there may have been a part of the sample before or after.
                    bad[f"byte {end}"] = "damaged"
                    last = ""
                end = entry.offset_data + (-(-entry.size // _BLOCK) * _BLOCK if entry.isreg() else 0)
                key, suffix = _split_name(name)
                if entry.size < 0:  # the header is whole all the same; what follows it is looked at
                    bad[key or name] = "has a length below zero"
                    tar.offset = end = entry.offset_data
                    last = ""
                    continue
                if entry.isdir() or _META.match(name):
                    continue
                if not entry.isreg():
                    bad[name] = "not a file"
                elif not suffix or name.startswith("/") or ".." in name.split("/"):
                    bad[name] = "not a name that a sample has"
                elif end > size:
                    bad[key] = "cut short"
                elif key in found and (key != last or suffix in found[key].parts):
                    bad[key] = f"its .{suffix} comes twice, or apart from its other members"
                else:
                    found.setdefault(key, Member(shown(key, _LONGEST_KEY), entry.offset)).parts[suffix] = (
                        entry.offset_data,
                        entry.size,
                    )
                last = key
    except Exception as fault:  # tarfile raises whatever the broken header led to
        bad[f"byte {end}"] = f"not a whole tar ({brief(fault)})"
    if closed and (size - end < 2 * _BLOCK or not _all_zeros(file, end, size)):
        bad.setdefault(f"byte {end}", "cut short: the tar is not closed")
    for key, member in found.items():
        if lacks := member.lacks(captions):
            bad.setdefault(key, lacks)
    good = [member for key, member in found.items() if key not in bad]
    return good, [f"{shown(key)}: {why}" for key, why in bad.items()]


def describe(path: Path, members: Sequence[Member], **more: Any) -> ShardEntry:
    """The index entry of a shard on disk that holds `members`; reads the file once for its sha256."""
    offsets = [member.offset for member in members]
    size = path.stat().st_size
    return ShardEntry(name=path.name, samples=len(offsets), size=size, sha256=sha256(path), offsets=offsets, **more)


def _split_name(name: str) -> tuple[str, str]:
    """Key and suffix as webdataset tells them apart; both empty for a name that has none."""
    key, suffix = base_plus_ext(name)
    return key or "", (suffix or "").lower()


def _all_zeros(file: BinaryIO, start: int, end: int) -> bool:
    file.seek(start)
    while start < end:
        block = file.read(min(1 << 20, end - start))
        if not block or block.count(0) < len(block):
            return False
        start += len(block)
    return True
