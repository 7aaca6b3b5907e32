"""`ppcl-data shard`: a folder of images with captions becomes tar shards, original bytes untouched."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import webdataset as wds

from ppcl_ds.console import track
from ppcl_ds.data.stream import Index, ShardEntry
from ppcl_ds.errors import UserError
from ppcl_ds.sections import Data
from ppcl_ds.whole import whole_folder

COMMAND = "ppcl-data shard"

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
"""Kinds of images that are read; the last part of a file name, in lower case."""


@dataclass(frozen=True)
class _Pair:
    """An image and its caption on disk."""

    key: str
    image: Path
    caption: Path

    @property
    def place(self) -> int:
        """The key's stable hash, 64 bits: decides the split and the order."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big")


def shard(data: Data) -> None:
    """Write `data.shards/raw/`: `train-000000.tar` ..., `heldout-000000.tar` ... and `index.json`.

    Every sample has the members KEY.png (or .jpg, .jpeg, .webp) and KEY.txt; KEY is the path below `data.source`
    without its suffix, other characters than letters, digits, `_` and `-` replaced by `_`. Samples are laid out by
    the hash of their key, so that each shard is a fair mix of the folder. The same folder gives the same bytes.
    Hidden files and folders are passed over. When the shards are already there, made with the same
    recipe values, nothing is done.

    Raises:
        UserError: an image has no caption, two files have one key, a split is empty, or `raw/` is not ours.
    """
    raw = data.shards / "raw"
    settings = data.model_dump(mode="json", include={"source", "samples_per_shard", "heldout"})
    if _is_whole(raw, settings):
        print(f"{raw}: already sharded; delete the folder to do it again")
        return
    splits = _split(_find_pairs(data.source), data.heldout)
    with whole_folder(raw) as folder:
        entries = {split: _write(folder, split, pairs, data.samples_per_shard) for split, pairs in splits.items()}
        index = Index(shards=[entry for shards in entries.values() for entry in shards], settings=settings)
        index.write(folder / "index.json")
    print(f"{raw}: " + ", ".join(f"{len(splits[s])} {s} samples (shards: {len(entries[s])})" for s in splits))


def describe(path: Path, samples: int, raw_sha256: str = "") -> ShardEntry:
    """The index entry of a shard on disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    size = path.stat().st_size
    return ShardEntry(name=path.name, samples=samples, size=size, sha256=digest.hexdigest(), raw_sha256=raw_sha256)


def _is_whole(raw: Path, settings: dict[str, object]) -> bool:
    path = raw / "index.json"
    if not path.exists():
        if raw.is_dir() and any(raw.iterdir()):
            raise UserError(f"{raw} holds files but no index.json, so it was not written here; move it away first")
        return False
    index = Index.read(path, COMMAND)
    return index.settings == settings and all(entry.is_in(raw) for entry in index.shards)


def _find_pairs(source: Path) -> list[_Pair]:
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; set `data.source` to a folder of images with captions")
    pairs: dict[str, _Pair] = {}
    for image in sorted(source.rglob("*")):
        relative = image.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or image.suffix.lower().lstrip(".") not in IMAGE_SUFFIXES or not image.is_file():
            continue
        pair = _pair(image, relative)
        if pair.key in pairs:
            raise UserError(f"{pairs[pair.key].image} and {image} would both have the key {pair.key}; rename one")
        pairs[pair.key] = pair
    if not pairs:
        raise UserError(
            f"{source}: no images ({', '.join(IMAGE_SUFFIXES)}); set `data.source` to a folder that has some"
        )
    return sorted(pairs.values(), key=lambda pair: (pair.place, pair.key))


def _pair(image: Path, relative: Path) -> _Pair:
    # webdataset reads everything after the first dot as the suffix, and skips some names that hold a slash.
    key = re.sub(r"[^\w-]", "_", str(relative.with_suffix("")))
    caption = image.with_suffix(".txt")
    if not caption.is_file():
        raise UserError(f"{image} has no caption; write one to {caption} or remove the image")
    return _Pair(key, image, caption)


def _split(pairs: list[_Pair], heldout: float) -> dict[str, list[_Pair]]:
    if not heldout:
        return {"train": pairs}
    splits = {
        "train": [pair for pair in pairs if pair.place >= heldout * 2**64],
        "heldout": [pair for pair in pairs if pair.place < heldout * 2**64],
    }
    for split, members in splits.items():
        if not members:
            raise UserError(
                f"data.heldout {heldout} of {len(pairs)} samples leaves no {split} samples; change it or add images"
            )
    return splits


def _write(folder: Path, split: str, pairs: list[_Pair], per_shard: int) -> list[ShardEntry]:
    pattern = str(folder).replace("%", "%%") + f"/{split}-%06d.tar"
    with wds.ShardWriter(
        pattern, maxcount=per_shard, maxsize=float("inf"), verbose=0, encoder=False, mtime=0
    ) as writer:
        for pair in track(pairs, f"{split} shards", len(pairs)):
            writer.write({"__key__": pair.key, **_members(pair)})
    counts = [min(per_shard, len(pairs) - first) for first in range(0, len(pairs), per_shard)]
    return [describe(folder / f"{split}-{number:06d}.tar", count) for number, count in enumerate(counts)]


def _members(pair: _Pair) -> dict[str, bytes]:
    caption = pair.caption.read_bytes()
    try:
        caption.decode()
    except UnicodeDecodeError:
        raise UserError(f"{pair.caption} is not UTF-8 text; convert it") from None
    return {pair.image.suffix.lower().lstrip("."): pair.image.read_bytes(), "txt": caption}
