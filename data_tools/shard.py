"""`ppcl-data shard`: pictures and captions, wherever they come from, become tar shards, original bytes untouched."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from pydantic import BaseModel

from data_tools import sources
from data_tools.samples import caption_parts, image_suffix, members_of, picture_header, write_tar
from data_tools.sources import Found
from data_tools.summary import NAMED, Summary, check_bad, named, write_log
from data_tools.work import Journal, digest_of, spread
from ppcl_ds.console import Advance
from ppcl_ds.data import images as pictures
from ppcl_ds.data.index import Index, ShardEntry, describe
from ppcl_ds.errors import UserError
from ppcl_ds.sections import Data

COMMAND = "ppcl-data shard"

_PARTIAL, _JOURNAL, _FETCHED = "raw.partial", ".journal.jsonl", "fetched"


def shard(data: Data, workers: int = 1) -> Summary:
    """Write `data.shards/raw/`: `train-000000.tar` ..., `heldout-000000.tar` ..., `index.json` and `skipped.log`.

    Every sample has the members KEY.png (or another of `IMAGE_SUFFIXES`), KEY.txt, its main caption, and, where it has
    several, KEY.json with all of them. KEY is the path below the source without its suffix, or the name of the shard
    and the sample's key there, other characters than letters, digits, `_` and `-` replaced by `_`. Samples are laid out
    by the hash of their key, so that each shard is a fair mix of the source. The same source gives the same bytes.
    Hidden files and folders are passed over. When the shards are already there, made with the same recipe values,
    nothing is done; where some were lost, those alone are made again, unless the source was fetched or has changed. A
    run that was killed goes on at the shard where it was.

    Args:
        data: the recipe's section.
        workers: processes that write shards.

    Raises:
        UserError: the source cannot be used, two samples have one key, a split is empty, more than
            `data.max_bad_fraction` of the samples cannot be used, or `raw/` is not ours.
    """
    raw, partial = data.shards / "raw", data.shards / _PARTIAL
    settings = data.model_dump(
        mode="json", include={"source", "samples_per_shard", "shard_size", "heldout", "longest_side"}
    )
    done = _earlier(raw, settings)
    if done is not None:
        shutil.rmtree(partial, ignore_errors=True)
        if all(entry.is_in(raw) for entry in done.shards):
            _tidy(raw)
            return Summary(f"{raw}: already sharded; delete the folder to do it again", _figures(done, 0))
        raw.rename(partial)  # as a run that was killed: its journal knows the shards that are still there
    found, problems = sources.find(data.source, partial / _FETCHED, workers)
    total, bad = len(found) + len(problems), list(problems)
    check_bad(bad, total, data.max_bad_fraction, partial / "skipped.log")
    jobs = [
        _Job(f"{split}-{number:06d}.tar", str(partial), tuple(samples), data.longest_side)
        for split, members in _split(found, data.heldout).items()
        for number, samples in enumerate(_filled(members, data.samples_per_shard, int(data.shard_size)))
    ]
    partial.mkdir(parents=True, exist_ok=True)
    journal = Journal(
        partial / _JOURNAL, _Written, lambda written: written.entry is None or written.entry.is_in(partial)
    )

    def check(written: _Written) -> None:
        bad.extend(written.skipped)
        check_bad(bad, total, data.max_bad_fraction, partial / "skipped.log")

    results = spread(_write, jobs, "sharding", workers, journal, check)
    skipped = problems + [line for written in results for line in written.skipped]
    index = Index(
        shards=[written.entry for written in results if written.entry is not None], settings=settings, skipped=skipped
    )
    for split in ("train", "heldout") if data.heldout else ("train",):
        if not any(entry.name.startswith(split) for entry in index.shards):
            raise UserError(f"no {split} sample of {data.source} can be used: {'; '.join(skipped[:NAMED])}")
    _finish(partial, raw, index)
    smaller = sum(written.smaller for written in results)
    figures = _figures(index, smaller)
    counts = ", ".join(
        f"{figures['samples'][s]} {s} samples (shards: {figures['shards'][s]})" for s in figures["samples"]
    )
    lines = [f"{smaller} images made smaller, to {data.longest_side} pixels a side"] if smaller else []
    return Summary(f"{raw}: {counts}", figures, lines + named(skipped, raw / "skipped.log"))


@dataclass(frozen=True)
class _Job:
    """A shard to write."""

    name: str
    folder: str
    found: tuple[Found, ...]
    longest_side: int

    @property
    def samples(self) -> int:
        return len(self.found)

    @property
    def key(self) -> str:
        return digest_of([self.name, self.longest_side, sources.fingerprint(self.found)])


class _Written(BaseModel):
    """A shard that was written; no entry where none of its samples could be used."""

    entry: ShardEntry | None
    skipped: list[str]
    smaller: int


def _write(job: _Job, advance: Advance) -> _Written:
    path, skipped, smaller = Path(job.folder) / job.name, [], 0

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal smaller
        for sample in job.found:
            try:
                parts = sample.read()
                suffix = image_suffix(parts)
                image, made_smaller = _fitting({suffix: parts[suffix]}, job.longest_side)
                stored = {**image, **caption_parts(sample.captions(parts))}
            except (OSError, ValueError) as fault:
                why = f"cannot be read ({fault.strerror})" if isinstance(fault, OSError) else str(fault)
                skipped.append(f"{sample.name}: {why}")
            else:
                smaller += made_smaller
                yield sample.key, stored
            advance(1)

    write_tar(path, samples())
    members = members_of(path)
    assert len(members) + len(skipped) == len(job.found)
    if not members:
        path.unlink()
    return _Written(entry=describe(path, members) if members else None, skipped=skipped, smaller=smaller)


def _fitting(image: dict[str, bytes], longest_side: int) -> tuple[dict[str, bytes], bool]:
    """A picture, suffix -> bytes, at most so large, and whether it was made smaller for that."""
    ((suffix, data),) = image.items()
    try:
        width, height, _ = picture_header(data)
        if not longest_side or max(width, height) <= longest_side:
            return image, False
        picture = pictures.decode(data)
        # Transparency stays; palettes and other depths cannot be scaled as they are.
        own = picture.mode
        picture = ImageOps.exif_transpose(picture) if own in ("L", "RGB", "RGBA") else pictures.as_rgb(picture)
        if suffix != "png" and picture.mode == "RGBA":
            picture = pictures.as_rgb(picture)
    except ValueError as fault:
        raise ValueError(f"the {suffix} image {fault}") from None
    profile = picture.info.get("icc_profile") if picture.mode == own else None
    picture = ImageOps.contain(picture, (longest_side, longest_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if suffix == "png":
        picture.save(file, "PNG", icc_profile=profile)
        return {"png": file.getvalue()}, True
    picture.save(file, "JPEG", quality=95, icc_profile=profile)
    return {"jpg": file.getvalue()}, True


def _split(found: list[Found], heldout: float) -> dict[str, list[Found]]:
    if not heldout:
        return {"train": found}
    splits = {
        "train": [sample for sample in found if sample.place >= heldout * 2**64],
        "heldout": [sample for sample in found if sample.place < heldout * 2**64],
    }
    for split, members in splits.items():
        if not members:
            raise UserError(
                f"data.heldout {heldout} of {len(found)} samples leaves no {split} samples; change it or add images"
            )
    return splits


def _filled(found: list[Found], most: int, size: int) -> Iterator[list[Found]]:
    """Samples by shard: at most `most`, and no more than go into `size` bytes unless one alone is larger."""
    shard: list[Found] = []
    used = 0
    for sample in found:
        if shard and (len(shard) == most or used + sample.size > size):
            yield shard
            shard, used = [], 0
        shard.append(sample)
        used += sample.size
    yield shard


def _earlier(raw: Path, settings: dict[str, object]) -> Index | None:
    """The index of shards that were made with these settings; some may be lost."""
    path = raw / "index.json"
    if not path.exists():
        if raw.is_dir() and any(raw.iterdir()):
            raise UserError(f"{raw} holds files but no index.json, so it was not written here; move it away first")
        return None
    index = Index.read(path, COMMAND)
    return index if index.settings == settings else None


def _finish(partial: Path, raw: Path, index: Index) -> None:
    """Give the folder its name, with nothing in it but what belongs there."""
    write_log(partial / "skipped.log", index.skipped)
    if not index.skipped:
        (partial / "skipped.log").unlink()
    index.write(partial / "index.json")
    kept = {entry.name for entry in index.shards} | {"index.json", "skipped.log", _JOURNAL, _FETCHED}
    for path in partial.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(raw, ignore_errors=True)
    partial.rename(raw)
    _tidy(raw)


def _tidy(raw: Path) -> None:
    """Remove what only a run that goes on would need; a kill before costs no work. The journal stays, see `shard`."""
    shutil.rmtree(raw / _FETCHED, ignore_errors=True)


def _figures(index: Index, smaller: int) -> dict[str, Any]:
    splits = [s for s in ("train", "heldout") if any(entry.name.startswith(s) for entry in index.shards)]
    entries = {s: [entry for entry in index.shards if entry.name.startswith(s)] for s in splits}
    return {
        "samples": {s: sum(entry.samples for entry in entries[s]) for s in splits},
        "shards": {s: len(entries[s]) for s in splits},
        "bytes": {s: sum(entry.size for entry in entries[s]) for s in splits},
        "made_smaller": smaller,
        "skipped": index.skipped,
    }
