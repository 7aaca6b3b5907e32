"""`ppcl-data index`: an `index.json` for shards that someone else wrote."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel

from data_tools.fetch import REMOTE, shard_files, shard_name
from data_tools.samples import header_length, latent_shape, tensor_shapes
from data_tools.summary import Summary, named
from data_tools.work import Journal, digest_of, spread
from ppcl_ds.console import Advance
from ppcl_ds.data.index import Index, Member, ShardEntry, describe, scan
from ppcl_ds.errors import UserError


def index(shards: Sequence[str], out: Path | None = None, workers: int = 1) -> Summary:
    """Write the index of shards, as training and `ppcl-data encode` read it. The shards stay as they are.

    What an earlier index says of shards that have not changed since (what they were made from and with) is kept.

    Args:
        shards: one folder, or tars, brace patterns and addresses; remote ones are fetched for a while.
        out: the index; default: `index.json` beside the shards.
        workers: processes that read shards.

    Raises:
        UserError: there are no shards, two have one name, or they lie in several places and `out` is not given.
    """
    folder = Path(shards[0]) if len(shards) == 1 and Path(shards[0]).is_dir() else None
    if out is None and any(REMOTE.match(pattern) for pattern in shards):
        raise UserError("shards of an address: say with `--out FILE` where their index goes")
    fetched = out.with_name(f"{out.name}.fetched") if out else Path("index.json.fetched")
    if folder is not None:
        named_paths = [(str(path), path) for path in sorted(folder.glob("*.tar"))]
    else:
        named_paths = [pair for pattern in shards for pair in shard_files(pattern, fetched, workers)]
    if not named_paths:
        raise UserError(f"{folder}: no shards (.tar)")
    places = {path.parent for _, path in named_paths}
    if out is None and len(places) > 1:
        raise UserError(f"the shards lie in {len(places)} folders; say with `--out FILE` where their index goes")
    out = out or places.pop() / "index.json"

    jobs: dict[str, _Job] = {}
    for source, path in named_paths:
        name = shard_name(source)
        if name in jobs:
            raise UserError(f"{jobs[name].source} and {source} have one name; an index cannot tell them apart")
        jobs[name] = _Job(name, source, str(path), _stamp(path))
    journal = Journal(out.with_name(f".{out.name}.journal"), _Indexed)
    found = spread(_read, list(jobs.values()), "indexing", workers, journal)
    new = _with_what_was_known(found, out)
    new.write(out)
    journal.forget()
    shutil.rmtree(fetched, ignore_errors=True)

    foreign = [entry.name for entry in new.shards if not entry.name.startswith(("train-", "heldout-"))]
    lines = named(new.skipped, out)
    if foreign:
        lines.append(
            f"training reads only shards named train-... and heldout-...; {len(foreign)} are not: {foreign[0]}"
        )
    figures = {
        "index": str(out),
        "samples": new.samples,
        "shards": len(new.shards),
        "bytes": sum(entry.size for entry in new.shards),
        "skipped": new.skipped,
        "names_that_training_does_not_read": foreign,
    }
    return Summary(f"{out}: {new.samples} samples (shards: {len(new.shards)})", figures, lines)


def shapes_of(file: BinaryIO, members: Sequence[Member]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Latent shapes of encoded samples from their headers: shape -> numbers; and key -> why for those without."""
    shapes: dict[str, list[int]] = {}
    bad: dict[str, str] = {}
    usable = 0
    for member in members:
        if "safetensors" in member.parts:
            start, length = member.parts["safetensors"]
            file.seek(start)
            head = file.read(min(length, 8))
            head += file.read(min(length, header_length(head)) - len(head))
            try:
                shapes.setdefault(latent_shape(tensor_shapes(head)), []).append(usable)
            except ValueError as fault:
                bad[member.key] = str(fault)
                continue
        usable += 1
    return shapes, bad


@dataclass(frozen=True)
class _Job:
    name: str
    source: str
    path: str
    stamp: tuple[int, int]
    samples: int = 1

    @property
    def key(self) -> str:
        return digest_of([self.source, self.stamp])


class _Indexed(BaseModel):
    entry: ShardEntry
    skipped: list[str]


def _read(job: _Job, advance: Advance) -> _Indexed:
    path = Path(job.path)
    with path.open("rb") as file:
        members, problems = scan(file)
        shapes, bad = shapes_of(file, members)
    entry = describe(path, [member for member in members if member.key not in bad], shapes=shapes)
    problems += [f"{key}: {why}" for key, why in bad.items()]
    advance(1)
    return _Indexed(
        entry=entry.model_copy(update={"name": job.name}), skipped=[f"{job.name}:{line}" for line in problems]
    )


def _with_what_was_known(found: Sequence[_Indexed], out: Path) -> Index:
    try:
        old = Index.model_validate_json(out.read_bytes())
    except (OSError, ValueError):
        old = Index(shards=[])
    known = {(entry.name, entry.sha256): entry for entry in old.shards}
    entries = [
        new.entry.model_copy(update={"raw_sha256": known[new.entry.name, new.entry.sha256].raw_sha256})
        if (new.entry.name, new.entry.sha256) in known
        else new.entry
        for new in found
    ]
    unchanged = {(entry.name, entry.sha256) for entry in entries} == set(known)
    skipped = [line for new in found for line in new.skipped]
    if unchanged:
        skipped = list(dict.fromkeys([*old.skipped, *skipped]))
        places = {shard: place for place, shard in enumerate(known)}
        entries.sort(key=lambda entry: places[entry.name, entry.sha256])
    return Index(shards=entries, settings=old.settings if unchanged else {}, skipped=skipped)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
