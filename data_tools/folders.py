"""Folders of images with captions beside them, and what else lies there: tables and shards."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from webdataset.shardlists import expand_urls

from data_tools.found import Found, Source, piece_of, stamp_of
from data_tools.frames import frames_in, is_clip
from data_tools.samples import SOURCE
from ppcl_ds.data.index import IMAGE_SUFFIXES, SUFFIXES
from ppcl_ds.errors import UserError, brief, missing, problem, shown
from ppcl_ds.hub import data_folder, is_id
from ppcl_ds.sections import Data

FOLDER_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables of the folder that they lie in (Hugging Face's imagefolder). Other parquet files in a folder are read too."""


_BESIDE = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".tar")
"""Endings of captions, tables and shards, which are fetched of a data set beside its images and clips."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zX": "xz", b"BZh": "bzip2"}


LONGEST = 4096
"""Characters of a path in a state."""


_SOURCE = f".{SOURCE.rstrip('.')}"


_POINTER = b"version https://git-lfs"


@dataclass
class Listing:
    """What a look at names and times shows; tables and shards are not opened.

    Attributes:
        source: of the folders' own images.
        places: folder -> number of its source and what it is relative to.
        shards: name and path of tars.
        tables: those that were named, and those that lie in folders.
        texts: files with a caption a line.
        uncaptioned: images without a caption, which a table may have; path -> problem.
        clips: folders of frames.
    """

    source: Source = field(default_factory=Source)
    shards: list[tuple[str, Path]] = field(default_factory=list)
    tables: list[tuple[Path, bool]] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    uncaptioned: dict[str, str] = field(default_factory=dict)
    clips: set[Path] = field(default_factory=set)


def local_paths(source: str) -> list[Path]:
    """The files and folders that a local source names."""
    if Path(source).exists():
        return [Path(source)]
    if is_id(source):
        return [data_folder(source, (*SUFFIXES, *_BESIDE))]
    try:
        names = list(expand_urls(source))
    except ValueError as fault:
        raise UserError(f"{source}: {brief(fault)}") from None
    paths = [
        Path(match)
        for name in names
        for match in ([name] if Path(name).exists() else sorted(glob.glob(name)) or [name])
    ]
    for path in paths:
        if not path.exists():
            raise UserError(f"{missing(path)}; set `data.source` to what is there")
    return paths


def packed_as(path: Path) -> str:
    """What to say of a file that is something else than its name says; empty: nothing."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as fault:
        raise UserError(f"{shown(path)}: cannot be read ({fault.strerror})") from None
    if head.startswith(_POINTER):
        return ": it is a pointer of git-lfs, not the file; fetch it with `git lfs pull`"
    kind = next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), "")
    return f": it is compressed ({kind}); unpack it first" if kind else ""


def in_folder(listing: Listing, data: Data, top: Path) -> None:
    """Add what lies in a folder and the folders in it."""
    source = listing.source
    alone: list[str] = []
    for folder, names in _walk(top, source.problems):
        if folder in listing.clips:
            continue
        shards = {Path(name).stem for name in names if name.lower().endswith(".tar")}
        for name in names:
            kind = os.path.splitext(name)[1].lower()
            if kind == ".tar":
                listing.shards.append((str(folder / name), folder / name))
            elif name in FOLDER_TABLES or (kind == ".parquet" and Path(name).stem not in shards):
                listing.tables.append((folder / name, False))
        for files in _by_stem(names):
            _in_stem(listing, data, folder, files, alone, os.path.relpath(folder, top))
    if alone:
        source.notes.append(f"{len(alone)} captions without an image beside them, such as {shown(alone[0])}")


def _by_stem(names: Iterable[str]) -> Iterator[dict[str, list[str]]]:
    """Files that belong together, suffix in lower case -> names.

    Systems write one accent in two forms. A name that has image and caption in its own form is left alone.
    """
    forms: dict[str, dict[str, dict[str, list[str]]]] = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        stem, suffix = (stem, suffix.lower()) if stem else (suffix, "")
        same = forms.setdefault(unicodedata.normalize("NFC", stem), {})
        same.setdefault(stem, {}).setdefault(suffix, []).append(name)
    for stem in [stem for stem in forms if stem.endswith(_SOURCE)]:
        _beside(forms, stem)
    for same in forms.values():
        rest: dict[str, list[str]] = {}
        for files in same.values():
            if files.keys() & set(SUFFIXES) and files.keys() & {"txt", "json"}:
                yield files
                continue
            for suffix, alike in files.items():
                rest.setdefault(suffix, []).extend(alike)
        if rest:
            yield rest


def _beside(forms: dict[str, dict[str, dict[str, list[str]]]], stem: str) -> None:
    """Images called NAME.source join the image NAME, as its `source.png`, unless they have captions of their own."""
    kinds = {suffix for files in forms[stem].values() for suffix in files}
    images = [files for files in forms.get(stem.removesuffix(_SOURCE), {}).values() if files.keys() & set(SUFFIXES)]
    if not images or not kinds <= set(IMAGE_SUFFIXES):
        return
    for files in forms.pop(stem).values():
        for suffix, names in files.items():
            images[0].setdefault(SOURCE + suffix, []).extend(names)


def _in_stem(
    listing: Listing, data: Data, folder: Path, files: dict[str, list[str]], alone: list[str], below: str
) -> None:
    """The files of one name in a folder, by suffix."""
    source = listing.source
    captions = {kind: files[kind] for kind in ("txt", "json") if kind in files}
    images = {name: suffix for suffix, names in files.items() for name in names if suffix in SUFFIXES}
    stills = {name: suffix for name, suffix in images.items() if suffix in IMAGE_SUFFIXES}
    if data.images.frames == 1:  # beside a photograph telephones leave a clip
        images = stills or images
    others = [name for suffix, names in files.items() if suffix not in ("txt", "json") for name in names]
    clip = None
    if captions and not images and data.images.frames > 1:
        named = folder / os.path.splitext(next(iter(captions.values()))[0])[0]
        clip = named if is_clip(named) else None
    if not images and not clip:
        if captions and others:
            known = f"not a kind of image that is read ({', '.join(SUFFIXES)})"
            source.problems.append(problem(folder / others[0], f"it has a caption, but is {known}"))
        elif "txt" in captions:
            alone.append(str(folder / captions["txt"][0]))
        return
    path = clip or folder / next(iter(images))
    try:
        if clip:
            listing.clips.add(clip)
            pieces = frames_in(clip)
        else:
            path = folder / chosen_image({name: name.lower() for name in images}, data.image_suffixes)
            pieces = {images[path.name]: piece_of(path)}
        for kind, (caption, *more) in captions.items():
            if more:
                raise ValueError(f"it has two captions, {shown(caption)} and {shown(more[0])}")
            pieces[kind] = piece_of(folder / caption)
        sources = [(kind, name) for kind, names in files.items() if kind.startswith(SOURCE) for name in names]
        if len(sources) > 1:
            raise ValueError(f"it has two source images, {shown(sources[0][1])} and {shown(sources[1][1])}")
        pieces |= {kind: piece_of(folder / name) for kind, name in sources}
    except (OSError, ValueError) as fault:
        source.problems.append(problem(path, fault))
        source.state[shown(path, LONGEST)] = ""
        return
    source.state[shown(path, LONGEST)] = stamp_of(*pieces.values())
    if not captions:
        beside = shown(path.with_suffix(".txt"))
        listing.uncaptioned[str(path)] = f"{shown(path)}: it has no caption; write one to {beside}"
        return
    stem = os.path.normpath(os.path.join(below, path.name if clip else os.path.splitext(path.name)[0]))
    source.found.append(Found(stem, os.path.abspath(path), shown(path), pieces, columns=data.caption_columns))


def _walk(top: Path, problems: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the names of their files, links followed, what is hidden passed over."""
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(top, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        try:
            stat = folder.stat()
            if (own := (stat.st_dev, stat.st_ino)) in above:
                continue  # a link back to where we came from
            with os.scandir(folder) as entries:
                below = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
        except OSError as fault:
            problems.append(problem(folder, fault))
            continue
        yield folder, [name for name, is_folder in below if not is_folder]
        waiting += [
            (folder / name, above | {own}) for name, is_folder in reversed(below) if is_folder and name != "__MACOSX"
        ]


def chosen_image(images: Mapping[str, str], wanted: Sequence[str]) -> str:
    """Which of a sample's images counts.

    Args:
        images: name -> how it ends, in lower case.
        wanted: `data.image_suffixes`.

    Raises:
        ValueError: several do, or none.
    """
    for ending in wanted or ("",):
        fits = [name for name, end in images.items() if not ending or f".{end}".endswith(f".{ending}")]
        if len(fits) == 1:
            return fits[0]
        if fits:
            raise ValueError(
                f"it has {len(fits)} images ({shown(', '.join(fits))}); `data.image_suffixes` says which one is read"
            )
    raise ValueError(f"none of `data.image_suffixes` ({', '.join(wanted)})")
