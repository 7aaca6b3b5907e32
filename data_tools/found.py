"""A sample where it lies before it is stored, and what a look at a source has found."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.samples import captions_of
from ppcl_ds.data.clips import FRAME, packed


class Piece(NamedTuple):
    """Bytes of a file."""

    path: str
    start: int
    length: int
    stamp: int
    """When the file last changed, in nanoseconds."""


@dataclass(frozen=True)
class Found:
    """A sample before it is stored.

    Attributes:
        key: its name in the shards; at first, its name below the source, without suffix.
        origin: its name in the source, which no other sample has.
        name: `file` or `shard:key`, as it is called in messages.
        pieces: suffix -> where it lies: the image, or the frames of a clip, and, if they have files, the captions.
        given: captions by name, the main one first, where they come from a table.
        columns: `data.caption_columns`, where captions come from a file.
    """

    key: str
    origin: str
    name: str
    pieces: dict[str, Piece]
    given: dict[str, str] | None = None
    columns: tuple[str, ...] = ()

    @functools.cached_property
    def place(self) -> int:
        """The key's stable hash, 64 bits: decides the split and the order."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big")

    @property
    def size(self) -> int:
        """Bytes that it takes, about, in a tar: every member begins and ends at a multiple of 512."""
        lengths = [piece.length for piece in self.pieces.values()]
        if self.given is not None:
            lengths += [sum(len(text.encode(errors="replace")) for text in self.given.values())]
        return sum(512 + -(-length // 512) * 512 for length in lengths)

    def read(self) -> dict[str, bytes]:
        """What its members hold.

        Raises:
            OSError: a file cannot be read.
        """
        parts = {}
        for suffix, piece in self.pieces.items():
            with open(piece.path, "rb") as file:
                file.seek(piece.start)
                parts[suffix] = file.read(piece.length)
        frames = {name: parts.pop(name) for name in list(parts) if name.startswith(FRAME)}
        return parts | ({FRAME.rstrip("/"): packed(frames)} if frames else {})

    def captions(self, parts: Mapping[str, bytes]) -> dict[str, str]:
        """All captions by name, the main one first.

        Args:
            parts: what `read` gave.

        Raises:
            ValueError: there are none that can be read.
        """
        return captions_of(parts, self.columns) if self.given is None else self.given


@dataclass
class Source:
    """What is in `data.source`.

    Attributes:
        found: samples, in the order of their keys' hashes.
        problems: what cannot be used, a line each.
        notes: what else a person should know.
        state: file -> what is known of it without a look inside; other sources have other states.
    """

    found: list[Found] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    state: dict[str, str] = field(default_factory=dict)


def piece_of(path: Path) -> Piece:
    """A whole file."""
    stat = path.stat()
    return Piece(str(path), 0, stat.st_size, stat.st_mtime_ns)


def stamp_of(*pieces: Piece) -> str:
    """A short word that changes when one of the files does."""
    return hashlib.sha256(repr(pieces).encode(errors="surrogatepass")).hexdigest()[:16]


def fingerprint(samples: Iterable[Found]) -> str:
    """What tells apart two lists of samples: others, or the same from files that have changed."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(repr((sample.key, sorted(sample.pieces.items()), sample.given)).encode(errors="replace"))
    return whole.hexdigest()
