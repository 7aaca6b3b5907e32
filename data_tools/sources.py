"""Where images and captions come from: folders, tables and webdataset shards, local or remote."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.fetch import REMOTE, shard_files, shard_name
from data_tools.folders import FOLDER_TABLES, LONGEST, Listing, chosen_image, in_folder, local_paths, packed_as
from data_tools.found import Found, Piece, Source, piece_of, stamp_of
from data_tools.frames import frames_in
from data_tools.samples import SOURCE, captions_in, image_suffix, kind_of, together
from data_tools.tables import TABLES, Unpacked, Unpacking, holds_images, rows_of, unpack
from data_tools.work import Journal, spread
from ppcl_ds.data.index import SUFFIXES, Member, scan
from ppcl_ds.errors import UserError, problem, shown
from ppcl_ds.sections import Data


def find(data: Data, fetched: Path, workers: int = 1) -> Source:
    """All samples of `data.source`, and what is damaged there.

    Args:
        data: the recipe's section.
        fetched: a folder for what is fetched or unpacked; what lies there already is taken as it is.
        workers: processes that fetch and unpack.

    Raises:
        UserError: there is no such source, nothing is in it, a shard cannot be fetched.
    """
    listing = _listed(data)
    source = listing.source
    for address in filter(REMOTE.match, data.sources):
        for name, path in shard_files(address, fetched, workers):
            _in_shard(source, data, name, path)
    for name, path in listing.shards:
        _in_shard(source, data, name, path)
    packed = []
    in_tables: set[str] = set()
    for table, named in listing.tables:
        try:
            if holds_images(table, data.caption_columns, bool(data.sizes)):
                packed.append(table)
            else:
                in_tables |= _in_table(source, data, table)
        except UserError as fault:
            if named or table.name in FOLDER_TABLES:
                raise
            source.notes.append(f"not read: {fault}")  # such as what img2dataset writes beside its shards
    _in_packed(source, data, packed, fetched, workers)
    for text in listing.texts:
        _in_text(source, text)
    source.found = [sample for sample in source.found if sample.given is not None or sample.origin not in in_tables]
    alone = {path: why for path, why in listing.uncaptioned.items() if os.path.abspath(path) not in in_tables}
    source.problems += [why for path, why in alone.items() if os.path.dirname(os.path.abspath(path)) not in in_tables]
    if not source.found and not source.problems:
        raise UserError(
            f"{shown(', '.join(data.sources))}: no images ({', '.join(SUFFIXES)}), parquet files or shards (.tar)"
            f"{''.join(f'; {note}' for note in source.notes[:3])}; set `data.source` to what has some"
        )
    source.found = sorted(_apart(_merged(source.found)), key=lambda sample: (sample.place, sample.key))
    return source


def state(data: Data) -> dict[str, str]:
    """The state of `data.source` now, as `find` would see it; nothing is fetched or opened."""
    return _listed(data).source.state


def key_of(name: str) -> str:
    """A path without its suffix as the key of a sample."""
    # webdataset reads everything after the first dot as the suffix, and skips some names that hold a slash or begin
    # with two underscores.
    name = unicodedata.normalize("NFC", name.encode(errors="replace").decode())
    return re.sub(r"^__+", "_", re.sub(r"[^\w-]", "_", name))


def _merged(found: Iterable[Found]) -> Iterator[Found]:
    """One sample for all rows of an image."""
    rows: dict[str, list[Found]] = {}
    for sample in found:
        rows.setdefault(sample.origin, []).append(sample)
    for first, *others in rows.values():
        given = [sample.given for sample in (first, *others) if sample.given is not None]
        yield replace(first, given=together(given)) if others else first


def _apart(found: Iterable[Found]) -> Iterator[Found]:
    """Samples with keys; names that differ only in what keys do not keep get a short hash of the whole name."""
    same: dict[str, dict[str, list[Found]]] = {}
    for sample in found:
        same.setdefault(key_of(sample.key), {}).setdefault(sample.key, []).append(sample)
    for key, names in same.items():
        for name, samples in names.items():
            for sample in samples:
                whole = name if len(samples) == 1 else sample.origin
                mark = hashlib.sha256(whole.encode(errors="surrogatepass")).hexdigest()[:8]
                yield replace(sample, key=f"{key}-{mark}" if len(names) > 1 or len(samples) > 1 else key)


def _listed(data: Data) -> Listing:
    listing = Listing()
    for source in data.sources:
        if REMOTE.match(source):
            continue
        for path in local_paths(source):
            if path.is_dir():
                in_folder(listing, data, path)
            elif path.suffix.lower() == ".tar":
                listing.shards.append((str(path), path))
            elif path.suffix.lower() in TABLES:
                listing.tables.append((path, True))
            elif path.suffix.lower() == ".txt":
                if not data.sizes:
                    raise UserError(
                        f"{shown(path)} holds captions alone; say in `data.sizes` at which sizes they are drawn, such "
                        "as {1024x1024: 1}"
                    )
                listing.texts.append(path)
            else:
                raise UserError(
                    f"{shown(path)} is a file, and {path.suffix or 'a name without suffix'} is none that is read "
                    f"({', '.join(TABLES)}, .txt or .tar{packed_as(path)}); set `data.source` to one of those, or to a "
                    "folder"
                )
    for path in [*(path for path, _ in listing.tables), *(path for _, path in listing.shards), *listing.texts]:
        if kind := packed_as(path):
            raise UserError(f"{shown(path)} cannot be read{kind}")
        listing.source.state[shown(path, LONGEST)] = stamp_of(piece_of(path))
    return listing


def _in_text(source: Source, text: Path) -> None:
    """A caption a line."""
    for number, line in enumerate(text.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        name, origin = f"{shown(text)}:{number}", f"{os.path.abspath(text)}:{number}"
        try:
            captions = captions_in({"caption": line.decode().strip()})
            source.found.append(Found(f"{text.stem}/{number:08d}", origin, name, {}, captions))
        except UnicodeDecodeError:
            source.problems.append(f"{name}: not UTF-8")
        except ValueError as fault:
            source.problems.append(problem(name, fault))


def _in_table(source: Source, data: Data, table: Path) -> set[str]:
    """The paths that the table names."""
    column, rows = rows_of(table, data.caption_columns, bool(data.sizes))
    named = set()
    before = len(source.found) + len(source.problems)
    for number, row in rows:
        name = f"{shown(table)}:{number}"
        if isinstance(row, str):
            source.problems.append(problem(name, row))
            continue
        path = row.get(column)
        try:
            if data.sizes and not path:
                stem, origin = f"{table.stem}/{number:08d}", f"{os.path.abspath(table)}:{number}"
                source.found.append(Found(stem, origin, name, {}, captions_in(row, data.caption_columns)))
                continue
            if not isinstance(path, str) or not path or "\0" in path:
                raise ValueError(
                    "it has no path" if path in (None, "") else f"its `{column}` is {kind_of(path)}, no path"
                )
            image = table.parent / path
            named.add(os.path.abspath(image))
            source.found.append(_in_row(table, name, image, captions_in(row, data.caption_columns)))
        except (ValueError, OSError) as fault:
            why = fault.strerror if isinstance(fault, OSError) else fault
            source.problems.append(problem(f"{name}: {shown(path, 150)}" if isinstance(path, str) else name, why))
    if len(source.found) + len(source.problems) == before:
        raise UserError(f"{table} is empty; set `data.source` to a table that has some rows")
    return named


def _in_row(table: Path, name: str, image: Path, captions: dict[str, str]) -> Found:
    suffix = image.suffix.lower().lstrip(".")
    folder = image.is_dir()
    if suffix not in SUFFIXES and not folder:
        raise ValueError(f"not a kind of image that is read ({', '.join(SUFFIXES)})")
    pieces = frames_in(image) if folder else {suffix: piece_of(image)}
    try:
        below = str(image.relative_to(table.parent))
    except ValueError:
        below = str(image).lstrip("/")
    stem = os.path.splitext(os.path.normpath(below))[0]
    return Found(stem, os.path.abspath(image), f"{name} ({shown(image)})", pieces, captions)


def _in_packed(source: Source, data: Data, tables: Sequence[Path], fetched: Path, workers: int) -> None:
    """Parquet files that hold images: unpacked into tars, from which samples can be read in any order."""
    if not tables:
        return
    fetched.mkdir(parents=True, exist_ok=True)
    jobs = []
    for table in tables:
        stat = table.stat()
        tar = fetched / f"{hashlib.sha256(str(table).encode(errors='replace')).hexdigest()[:16]}.tar"
        jobs.append(Unpacking(str(table), str(tar), data.caption_columns, (stat.st_size, stat.st_mtime_ns)))
    journal = Journal(fetched / ".unpacked.jsonl", Unpacked, lambda done: Path(done.tar).exists())
    for job, done in zip(jobs, spread(unpack, jobs, "unpacking parquet", workers, journal), strict=True):
        source.problems += done.problems
        # Its rows were looked at; which tar they lie in for a while is nobody's business.
        _in_shard(source, data, job.table, Path(done.tar), job.stamp[1])


def _in_shard(source: Source, data: Data, name: str, path: Path, stamp: int = 0) -> None:
    if kind := packed_as(path):
        raise UserError(f"{shown(name)} cannot be read{kind}")
    with path.open("rb") as file:
        members, bad = scan(file, captions=bool(data.sizes))
    source.problems += [f"{shown(name)}:{line}" for line in bad]
    stem = Path(shard_name(name)).stem
    stamp = stamp or path.stat().st_mtime_ns
    for member in members:
        for key, parts in _samples_of(member).items():
            try:
                kinds = {suffix: suffix for suffix in parts if suffix.rpartition(".")[2] in SUFFIXES}
                wanted_itself = len(kinds) == 1 or any(SOURCE in ending for ending in data.image_suffixes)
                alone = bool(data.sizes) and all(kind.startswith(SOURCE) for kind in kinds)
                edited = image_suffix(kinds, SOURCE) if alone or not wanted_itself else ""
                rest = {kind: kind for kind in kinds if kind != edited}
                image = "" if alone else chosen_image(rest, data.image_suffixes)
                captions = _own_captions(parts)
            except ValueError as fault:
                source.problems.append(problem(f"{name}:{key}", fault))
                continue
            pieces = {
                suffix.rpartition(".")[2]: Piece(str(path), *parts[suffix], stamp)
                for suffix in (image, *captions)
                if suffix
            }
            if edited:
                pieces[edited] = Piece(str(path), *parts[edited], stamp)
            # Many number their samples anew in each shard, so a key alone does not tell them apart.
            origin = f"{name}:{key}"
            source.found.append(Found(f"{stem}/{key}", origin, shown(origin), pieces, columns=data.caption_columns))


def _samples_of(member: Member) -> dict[str, dict[str, tuple[int, int]]]:
    """What webdataset takes for one sample, by key: several where a name has a dot before that of its suffix.

    `a.front.jpg` beside `a.txt` is an image of the sample `a`; beside `a.front.txt` it is a sample of its own.
    """
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for suffix, place in member.parts.items():
        groups.setdefault(suffix.rpartition(".")[0], {})[suffix] = place
    whole = {
        name: parts
        for name, parts in groups.items()
        if (kinds := {suffix.rpartition(".")[2] for suffix in parts}) & set(SUFFIXES) and kinds & {"txt", "json"}
    }
    if not any(whole):
        return {member.key: member.parts}
    return {f"{member.key}.{name}".rstrip("."): parts for name, parts in whole.items()}


def _own_captions(parts: Mapping[str, Any]) -> list[str]:
    found = []
    for kind in ("txt", "json"):
        every = [suffix for suffix in parts if suffix.rpartition(".")[2] == kind]
        own = [suffix for suffix in every if suffix == kind] or every
        if len(own) > 1:
            raise ValueError(f"it has several captions ({shown(', '.join(own))})")
        found += own
    return found
