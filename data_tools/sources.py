"""Where pictures and captions come from: a folder, a table, or webdataset shards, local or remote."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.fetch import REMOTE, shard_files, shard_name
from data_tools.samples import captions_of, image_suffix, is_caption, main_first
from ppcl_ds.data.index import IMAGE_SUFFIXES, scan
from ppcl_ds.errors import UserError, brief

TABLES = (".jsonl", ".csv", ".parquet")
PATH_COLUMNS = ("path", "image", "file_name", "filename", "file")


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
        key: its name in the shards.
        name: `file` or `shard:key`, as it is called in messages.
        pieces: suffix -> where it lies: the picture and, if they have files, the captions.
        given: captions by name, the main one first, where they come from a table.
    """

    key: str
    name: str
    pieces: dict[str, Piece]
    given: dict[str, str] | None = None

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
        return parts

    def captions(self, parts: Mapping[str, bytes]) -> dict[str, str]:
        """All captions by name, the main one first.

        Args:
            parts: what `read` gave.

        Raises:
            ValueError: there are none that can be read.
        """
        return captions_of(parts) if self.given is None else self.given


def find(source: str, fetched: Path, workers: int = 1) -> tuple[list[Found], list[str]]:
    """All samples of `data.source`, in the order of their keys' hashes, and what is damaged there.

    Args:
        source: see the recipe.
        fetched: a folder for remote shards; what lies there already is not fetched again.
        workers: processes that fetch.

    Raises:
        UserError: there is no such source, nothing is in it, two samples have one key, a shard cannot be fetched.
    """
    local = Path(source)
    if local.is_dir():
        found, problems = _in_folder(local)
    elif local.suffix.lower() in TABLES and not REMOTE.match(source):
        found, problems = _in_table(local)
    elif REMOTE.match(source) or source.endswith((".tar", ".tar}")):
        found, problems = _in_shards(shard_files(source, fetched, workers))
    else:
        raise UserError(
            f"{source}: no such folder; set `data.source` to a folder of images with captions, a table "
            f"({', '.join(TABLES)}) or webdataset shards (.tar)"
        )
    by_key: dict[str, Found] = {}
    for sample in found:
        if sample.key in by_key:
            raise UserError(
                f"{by_key[sample.key].name} and {sample.name} would both have the key {sample.key}; rename one"
            )
        by_key[sample.key] = sample
    return sorted(found, key=lambda sample: (sample.place, sample.key)), problems


def key_of(name: str) -> str:
    """A path without its suffix as the key of a sample."""
    # webdataset reads everything after the first dot as the suffix, and skips some names that hold a slash or begin
    # with two underscores.
    return re.sub(r"^__+", "_", re.sub(r"[^\w-]", "_", name.encode(errors="replace").decode()))


def _in_folder(source: Path) -> tuple[list[Found], list[str]]:
    found, problems = [], []
    for image in sorted(source.rglob("*")):
        relative = image.relative_to(source)
        suffix = image.suffix.lower().lstrip(".")
        if any(part.startswith(".") for part in relative.parts) or suffix not in IMAGE_SUFFIXES or image.is_dir():
            continue
        try:
            pieces = {suffix: _piece(image)}
            for kind in ("txt", "json"):
                if os.path.lexists(captions := image.with_suffix(f".{kind}")):
                    pieces[kind] = _piece(captions)
        except OSError as fault:
            problems.append(f"{_shown(image)}: cannot be read ({fault.strerror})")
            continue
        if len(pieces) == 1:
            problems.append(f"{_shown(image)}: it has no caption; write one to {_shown(image.with_suffix('.txt'))}")
            continue
        found.append(Found(key_of(str(relative.with_suffix(""))), _shown(image), pieces))
    if not found and not problems:
        raise UserError(
            f"{source}: no images ({', '.join(IMAGE_SUFFIXES)}); set `data.source` to a folder that has some"
        )
    return found, problems


def _in_table(table: Path) -> tuple[list[Found], list[str]]:
    if not table.is_file():
        raise UserError(f"{table}: no such file; set `data.source` to a table that is there")
    columns: dict[str, None] = {}
    rows: list[tuple[int, dict[str, Any]]] = []
    problems = []
    reader = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[table.suffix.lower()]
    for number, row in reader(table):
        if isinstance(row, str):
            problems.append(f"{table}:{number}: {row}")
            continue
        columns |= dict.fromkeys(row)
        rows.append((number, {name: value for name, value in row.items() if name in PATH_COLUMNS or is_caption(name)}))
    paths = next((name for name in PATH_COLUMNS if name in columns), "")
    names = [name for name in columns if is_caption(name)]
    if rows and not (paths and names):
        needed = "captions (caption, text, prompt, caption_...)" if paths else f"paths ({', '.join(PATH_COLUMNS)})"
        raise UserError(f"{table} has no column of {needed}; its columns: {', '.join(columns)}")
    found = []
    for number, row in rows:
        name = f"{table}:{number}"
        try:
            given = {name: row[name] for name in names if isinstance(row.get(name), str)}
            sample = _in_row(table, name, row.get(paths), given)
        except (ValueError, OSError) as fault:
            why = fault.strerror if isinstance(fault, OSError) else fault
            problems.append(f"{name}: {row.get(paths)}: {why}".encode(errors="backslashreplace").decode())
        else:
            found.append(sample)
    if not found and not problems:
        raise UserError(f"{table} is empty; set `data.source` to a table that has some rows")
    return found, problems


def _in_row(table: Path, name: str, path: Any, captions: dict[str, str]) -> Found:
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError("it has no path")
    image = table.parent / path
    suffix = image.suffix.lower().lstrip(".")
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"not a kind of image that is read ({', '.join(IMAGE_SUFFIXES)})")
    pieces = {suffix: _piece(image)}
    try:
        below = image.relative_to(table.parent)
    except ValueError:
        below = Path(path.lstrip("/"))
    return Found(key_of(str(below.with_suffix(""))), f"{name} ({_shown(image)})", pieces, main_first(captions))


def _jsonl(table: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with table.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else "not a JSON object in UTF-8"


def _csv(table: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    csv.field_size_limit(sys.maxsize)  # captions may be longer than the usual limit
    # What is not UTF-8 becomes lone surrogates, by which a caption is found and a path works as it is.
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as fault:
                yield reader.line_num, str(fault)
            else:
                yield reader.line_num, {name: value for name, value in row.items() if isinstance(name, str)}


def _parquet(table: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    import pyarrow.parquet  # takes a while

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as fault:
        raise UserError(f"{table} is no parquet file ({brief(fault)})") from None


def _in_shards(shards: Sequence[tuple[str, Path]]) -> tuple[list[Found], list[str]]:
    found, problems = [], []
    for name, path in shards:
        with path.open("rb") as file:
            members, bad = scan(file)
        problems += [f"{name}:{problem}" for problem in bad]
        stat = path.stat()
        stem = Path(shard_name(name)).stem
        for member in members:
            suffix = image_suffix(member.parts)
            if not suffix:
                problems.append(f"{name}:{member.key}: no image ({', '.join(IMAGE_SUFFIXES)})")
                continue
            pieces = {
                kind: Piece(str(path), *member.parts[kind], stat.st_mtime_ns)
                for kind in (suffix, "txt", "json")
                if kind in member.parts
            }
            # Many number their samples anew in each shard, so a key alone does not tell them apart.
            found.append(Found(key_of(f"{stem}/{member.key}"), f"{name}:{member.key}", pieces))
    if not found and not problems:
        raise UserError(
            f"{', '.join(name for name, _ in shards[:3])}: no samples; set `data.source` to shards with some"
        )
    return found, problems


def _piece(path: Path) -> Piece:
    stat = path.stat()
    return Piece(str(path), 0, stat.st_size, stat.st_mtime_ns)


def _shown(path: Path) -> str:
    """A path that can be printed, whatever bytes are in it."""
    return str(path).encode(errors="backslashreplace").decode()


def fingerprint(samples: Iterable[Found]) -> str:
    """What tells apart two lists of samples: others, or the same from files that have changed."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(repr((sample.key, sorted(sample.pieces.items()), sample.given)).encode(errors="replace"))
    return whole.hexdigest()
