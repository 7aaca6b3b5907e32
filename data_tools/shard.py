"""`ppcl-data shard`: images and captions, wherever they come from, become tar shards, original bytes untouched."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel

from data_tools import sources
from data_tools.found import Found, fingerprint
from data_tools.samples import SOURCE, caption_parts, header_of, image_suffix, members_of, write_tar
from data_tools.summary import NAMED, Summary, check_bad, named, write_log
from data_tools.work import Journal, digest_of, spread
from ppcl_ds.atomic import atomic_write
from ppcl_ds.console import Advance
from ppcl_ds.data import images
from ppcl_ds.data.clips import is_clip
from ppcl_ds.data.index import SIZE, Index, ShardEntry, describe
from ppcl_ds.errors import UserError, problem, shown
from ppcl_ds.sampling import drawn
from ppcl_ds.sections import Data

COMMAND = "ppcl-data shard"

_PARTIAL, _JOURNAL, _FETCHED, _LAYOUT = "raw.partial", ".journal.jsonl", "fetched", ".source.json"


def shard(data: Data, workers: int = 1, update: bool = False) -> Summary:
    """Write `data.shards/raw/`: `train-000000.tar` ..., `heldout-000000.tar` ..., `index.json` and `skipped.log`.

    Every sample has the members KEY.png (or another of `SUFFIXES`), KEY.source.png, if a NAME.source.png lies
    beside it, KEY.txt, its main caption, and, where it has several, KEY.json with all of them. A caption without an
    image has KEY.size instead, the size at which it is drawn. KEY is the path below the source without its suffix, or
    the name of the shard and the sample's key there, other characters than letters, digits, `_` and `-` replaced by
    `_`. Samples are laid out by the hash of their key, so that each shard is a fair mix of the source. The same source
    gives the same bytes.
    Hidden files and folders are passed over. When the shards are already there, made with the same recipe values,
    nothing is done but to say whether the source has changed; where some were lost, those alone are made again. A run
    that was killed goes on at the shard where it was.

    Args:
        data: the recipe's section.
        workers: processes that write shards.
        update: take what is new or has changed in the source. Shards that hold what has changed or gone are written
            again, new samples go into more shards, and all others stay as they are.

    Raises:
        UserError: the source cannot be used, a split is empty, more than
            `data.max_bad_fraction` of the samples cannot be used, or `raw/` is not ours.
    """
    raw, partial = data.shards / "raw", data.shards / _PARTIAL
    settings = data.model_dump(
        mode="json", include={"source", "samples_per_shard", "shard_size", "heldout", "longest_side"}
    ) | data.model_dump(mode="json", include={"caption_columns", "image_suffixes", "sizes"}, exclude_defaults=True)
    if data.images.frames > 1:
        settings["clips"] = True
    done = _earlier(raw, settings)
    if done is not None:
        shutil.rmtree(partial, ignore_errors=True)
        if not update and all(entry.is_in(raw) for entry in done.shards):
            _tidy(raw)
            return Summary(f"{raw}: already sharded; delete the folder to do it again", _figures(done, 0), news(data))
        raw.rename(partial)  # as a run that was killed: its journal knows the shards that are still there
    layout = _Layout.read(partial)
    if layout is None or layout.settings != settings:
        layout = _Layout(settings=settings)
    source = sources.find(data, partial / _FETCHED, workers)
    found, problems = source.found, source.problems
    total, bad = len(found) + len(problems), list(problems)
    check_bad(bad, total, data.max_bad_fraction, partial / "skipped.log")
    jobs = _jobs(found, data, partial, layout)
    partial.mkdir(parents=True, exist_ok=True)
    written_last = _sums(partial)

    def holds(written: _Written) -> bool:
        entry = written.entry  # of an earlier content of the shard, which may have been as long?
        return entry is None or (entry.is_in(partial) and written_last.get(entry.name, entry.sha256) == entry.sha256)

    journal = Journal(partial / _JOURNAL, _Written, holds)

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
            raise UserError(f"no {split} sample of {shown(data.source)} can be used: {'; '.join(skipped[:NAMED])}")
    shards = {job.name: [sample.key for sample in job.found] for job in jobs}
    _Layout(settings=settings, state=source.state, shards=shards).write(partial)
    _finish(partial, raw, index)
    smaller = sum(written.smaller for written in results)
    figures = _figures(index, smaller)
    counts = ", ".join(
        f"{figures['samples'][s]} {s} samples (shards: {figures['shards'][s]})" for s in figures["samples"]
    )
    lines = [f"{smaller} images made smaller, to {data.longest_side} pixels a side"] if smaller else []
    return Summary(f"{raw}: {counts}", figures, lines + source.notes + named(skipped, raw / "skipped.log"))


def news(data: Data) -> list[str]:
    """A line that says how the source differs from what was sharded; none if it does not, or cannot be compared."""
    layout = _Layout.read(data.shards / "raw")
    if layout is None or not layout.state:
        return []
    try:
        now = sources.state(data)
    except UserError as fault:
        return [f"data.source was not compared with the shards: {fault}"]
    kinds = {
        "new": now.keys() - layout.state.keys(),
        "changed": {path for path in now.keys() & layout.state.keys() if now[path] != layout.state[path]},
        "gone": layout.state.keys() - now.keys(),
    }
    if not any(kinds.values()):
        return []
    told = ", ".join(f"{len(paths)} {kind} ({shown(min(paths))})" for kind, paths in kinds.items() if paths)
    return [f"data.source has changed since it was sharded: {told}; `{COMMAND} RECIPE --update` takes that"]


class _Layout(BaseModel):
    """What was sharded, and which sample went where.

    Attributes:
        settings: recipe values.
        state: of the source, see `sources.state`.
        shards: name -> keys, those of skipped samples included.
    """

    settings: dict[str, Any]
    state: dict[str, str] = {}
    shards: dict[str, list[str]] = {}

    @staticmethod
    def read(folder: Path) -> _Layout | None:
        """None where there is none, as in folders of earlier versions."""
        try:
            return _Layout.model_validate_json((folder / _LAYOUT).read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        atomic_write(folder / _LAYOUT, self.model_dump_json())


def _jobs(found: list[Found], data: Data, folder: Path, layout: _Layout) -> list[_Job]:
    """Shards to write: those that were, as far as their samples are still there, and more for the others."""
    new = {sample.key: sample for sample in found}
    shards = {name: [new.pop(key) for key in keys if key in new] for name, keys in layout.shards.items()}
    for split, members in _split(found, data.heldout).items():
        if not members:
            share = f"data.heldout {data.heldout} of {len(found)} samples"
            raise UserError(f"{share} leaves no {split} samples; change it or add images")
    for split, members in _split(new.values(), data.heldout).items():
        numbers = [int(name.removeprefix(f"{split}-")[:6]) for name in layout.shards if name.startswith(f"{split}-")]
        filled = _filled(members, data.samples_per_shard, int(data.shard_size))
        for number, samples in enumerate(filled, max(numbers, default=-1) + 1):
            shards[f"{split}-{number:06d}.tar"] = samples
    return [
        _Job(name, str(folder), tuple(samples), data.longest_side, data.sizes)
        for name, samples in shards.items()
        if samples
    ]


def _sums(folder: Path) -> dict[str, str]:
    """The sha256 of shards by the index that lies there, if one does."""
    try:
        index = Index.model_validate_json((folder / "index.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return {entry.name: entry.sha256 for entry in index.shards}


@dataclass(frozen=True)
class _Job:
    """A shard to write."""

    name: str
    folder: str
    found: tuple[Found, ...]
    longest_side: int
    sizes: Mapping[str, float]

    @property
    def samples(self) -> int:
        return len(self.found)

    @property
    def key(self) -> str:
        return digest_of([self.name, self.longest_side, fingerprint(self.found), *([self.sizes] if self.sizes else [])])


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
                own = image_suffix(parts)
                if job.sizes and not own:
                    image, made_smaller = {SIZE: drawn(job.sizes, sample.key).encode()}, False
                else:
                    image, made_smaller = _fitting(own, parts, job.longest_side)
                if source := image_suffix(parts, SOURCE):
                    edited, _ = _fitting(source, parts, job.longest_side)
                    image |= {SOURCE + suffix: data for suffix, data in edited.items()}
                stored = {**image, **caption_parts(sample.captions(parts))}
            except Exception as fault:  # whatever its bytes led to, it costs no other sample its place
                skipped.append(problem(sample.name, fault))
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


def _fitting(name: str, parts: Mapping[str, bytes], longest_side: int) -> tuple[dict[str, bytes], bool]:
    """A sample's image of that name at most so large, suffix -> bytes, and whether it was made smaller; clips stay."""
    suffix, data = name.removeprefix(SOURCE), parts[name]
    header = header_of(parts, name)
    if is_clip(suffix) or not longest_side or max(header.width, header.height) <= longest_side:
        return {suffix: data}, False
    try:
        image = images.decode(data)
        # Transparency and colour profile stay; palettes and other depths cannot be scaled as they are.
        kept = ("L", "RGB", "RGBA") if suffix == "png" else ("L", "RGB")
        image = images.upright(image) if image.mode in kept else images.as_rgb(image)
        scale = longest_side / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        file = io.BytesIO()
        kind, options = ("PNG", {}) if suffix == "png" else ("JPEG", {"quality": 95})
        image.save(file, kind, icc_profile=image.info.get("icc_profile"), **options)
    except ValueError as fault:
        raise ValueError(f"the {name} image {fault}") from None
    return {"png" if suffix == "png" else "jpg": file.getvalue()}, True


def _split(found: Iterable[Found], heldout: float) -> dict[str, list[Found]]:
    splits: dict[str, list[Found]] = {"train": [], **({"heldout": []} if heldout else {})}
    for sample in found:
        splits["train" if sample.place >= heldout * 2**64 else "heldout"].append(sample)
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
    kept = {entry.name for entry in index.shards} | {"index.json", "skipped.log", _JOURNAL, _LAYOUT, _FETCHED}
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
