"""`ppcl-data verify`: is every shard whole, every sample usable and all as the index says; and clean copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from data_tools.index import shapes_of
from data_tools.samples import SOURCE, captions_of, frames_of, header_of, image_suffix, read_parts, write_tar
from data_tools.summary import Summary
from data_tools.work import Journal, digest_of, spread
from ppcl_ds.atomic import sha256
from ppcl_ds.console import Advance
from ppcl_ds.data.index import SIZE, Index, Member, ShardEntry, describe, scan
from ppcl_ds.data.stored import EMPTY, Stored, Texts
from ppcl_ds.data.stream import TEXTS
from ppcl_ds.errors import UserError, problem

_SHOWN = 200
"""Problems that are printed."""


def verify(folder: Path, repair: Path | None = None, workers: int = 1) -> Summary:
    """Look at every byte of a folder of shards, or of its `raw/` and `encoded/`.

    Args:
        folder: shards, with their index if they have one. They stay as they are; without `repair`, a hidden file lies
            beside them until all is looked at, so that a run that was killed goes on.
        repair: a folder, new or empty, for copies of the shards that hold good samples only, and their index.
        workers: processes that read shards.

    Returns:
        What was found: `figures["problems"]` has a line for each problem, `shard:key: why`.

    Raises:
        UserError: there are no shards in `folder`, or something is in `repair`.
    """
    folders = [folder / name for name in ("raw", "encoded") if (folder / name).is_dir()] or [folder]
    work = None
    if repair is not None:
        if repair.exists() and not (repair.is_dir() and not any(repair.iterdir())):
            raise UserError(f"{repair}: not an empty folder; name a new one")
        work = repair.with_name(f"{repair.name}.partial")
        work.mkdir(parents=True, exist_ok=True)
    looks = [_Look.at(path, (work / path.name if len(folders) > 1 else work) if work else None) for path in folders]
    if not any(look.jobs or look.problems for look in looks):
        raise UserError(f"{folder}: no shards (.tar)")

    def holds(seen: _Seen) -> bool:
        return seen.repaired is None or seen.repaired.is_in(Path(seen.place))

    journal = Journal((work or folder) / ".verify.journal", _Seen, holds)
    seen = iter(spread(_see, [job for look in looks for job in look.jobs], "verifying", workers, journal))
    results = [[next(seen) for _ in look.jobs] for look in looks]
    journal.forget()
    problems = [
        line
        for look, shards in zip(looks, results, strict=True)
        for line in look.problems + [line for shard in shards for line in shard.problems]
    ]
    if work is not None and repair is not None:
        for look, shards in zip(looks, results, strict=True):
            look.finish(shards)
        shutil.rmtree(repair, ignore_errors=True)
        work.rename(repair)
    samples = sum(shard.good for shards in results for shard in shards)
    count = sum(len(shards) for shards in results)
    figures = {
        "problems": problems,
        "good_samples": samples,
        "shards": count,
        "repaired": str(repair) if repair is not None else None,
    }
    lines = problems[:_SHOWN] + (["..., and more; `--json FILE` names all"] if len(problems) > _SHOWN else [])
    lines += [f"clean copies: {repair}"] if repair is not None else []
    what = f"{len(problems)} problems" if problems else "nothing is wrong"
    return Summary(f"{folder}: {what}; {samples} good samples (shards: {count})", figures, lines, found=bool(problems))


def see(path: Path, entry: ShardEntry | None = None, advance: Callable[[int], None] = lambda count: None) -> Seen:
    """Look at every sample of a shard.

    Args:
        path: the tar; may hold anything.
        entry: what the index says of it.
        advance: called with 1 for each sample.

    Returns:
        What is wrong, and what is good. Nothing is raised for what lies in the file.
    """
    problems: list[str] = []
    good = []
    try:
        with path.open("rb") as file:
            members, problems = scan(file)
            bad = [f"{path.name}:{problem}" for problem in problems]
            for member in members:
                try:
                    check_sample(read_parts(file, member))
                    good.append(member)
                except ValueError as fault:
                    bad.append(problem(f"{path.name}:{member.key}", fault))
                advance(1)
            shapes, _ = shapes_of(file, good)
        if entry is not None:
            problems = [f"{path.name}: {why}" for why in _differences(path, entry, members, good, shapes)]
    except OSError as fault:
        return Seen([problem(path.name, fault)], [], [], {})
    return Seen(problems, bad, good, shapes)


@dataclass
class Seen:
    """What is in a shard.

    Attributes:
        problems: of the shard as a whole.
        bad: what is wrong with samples, or with the tar between them.
        good: samples that can be used.
        shapes: latent shape -> numbers among the good ones.
    """

    problems: list[str]
    bad: list[str]
    good: list[Member]
    shapes: dict[str, list[int]]


def check_sample(parts: Mapping[str, bytes]) -> None:
    """Decode all that a sample holds.

    Raises:
        ValueError: a part is missing or damaged; the message says which.
    """
    captions = captions_of(parts)
    own = image_suffix(parts)
    for suffix in filter(None, (own, image_suffix(parts, SOURCE))):
        header_of(parts, suffix)  # decoders take a clip that is cut short for a shorter one
        for _ in frames_of(parts, suffix):
            pass
    if "safetensors" in parts:
        _check_tensors(parts["safetensors"], captions)
    elif not own and SIZE not in parts:
        raise ValueError("it has neither image nor latents")


def _check_tensors(data: bytes, captions: Mapping[str, str]) -> None:
    stored = Stored.read(data)
    if stored.latents.ndim not in (3, 4) or 0 in stored.latents.shape[1:]:
        raise ValueError(f"latents of shape {tuple(stored.latents.shape)}")
    for caption, prompt in stored.prompts.items():
        if caption and caption != EMPTY and caption not in captions:
            raise ValueError(f"text.{caption} is of a caption that it does not have")
        for what, tensors in (("latents", [stored.latents]), (f"text{caption and '.'}{caption}", prompt.tensors())):
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                raise ValueError(f"NaN or infinity in its {what}")


def _differences(
    path: Path, entry: ShardEntry, members: list[Member], good: list[Member], shapes: dict[str, list[int]]
) -> list[str]:
    found = []
    size = path.stat().st_size
    if size != entry.size:
        found.append(f"{size} bytes long, its index says {entry.size}")
    if sha256(path) != entry.sha256:
        found.append("its checksum is not the one in the index")
    if len(members) != entry.samples or len(entry.offsets) != entry.samples:
        found.append(f"holds {len(members)} samples, its index says {entry.samples}")
    elif [member.offset for member in members] != entry.offsets:
        found.append("its samples do not lie where the index says")
    elif len(good) == len(members) and shapes != entry.shapes:
        found.append("its latents do not have the shapes that the index says")
    return found


@dataclass(frozen=True)
class _Job:
    path: str
    entry: ShardEntry | None
    repair: str | None

    @property
    def samples(self) -> int:
        return self.entry.samples if self.entry else 1

    @property
    def key(self) -> str:
        stat = Path(self.path).stat()
        entry = self.entry.model_dump() if self.entry else None
        return digest_of([self.path, stat.st_size, stat.st_mtime_ns, entry, self.repair])


class _Seen(BaseModel):
    problems: list[str]
    bad: list[str]
    """Those of the problems that cost samples."""
    good: int
    place: str
    repaired: ShardEntry | None


def _see(job: _Job, advance: Advance) -> _Seen:
    path = Path(job.path)
    left = job.samples

    def step(count: int) -> None:
        nonlocal left
        if left:
            advance(count)
            left -= count

    seen = see(path, job.entry, step)
    if left:
        advance(left)
    repaired = None
    if job.repair is not None and seen.good:
        copy = Path(job.repair) / path.name
        if seen.problems or seen.bad:
            with path.open("rb") as file:
                write_tar(copy, ((member.key, read_parts(file, member)) for member in seen.good))
        else:
            partial = copy.with_name(f"{copy.name}.partial")
            shutil.copyfile(path, partial)
            partial.replace(copy)
        with copy.open("rb") as file:
            members, _ = scan(file)
        raw_sha256 = job.entry.raw_sha256 if job.entry else ""
        repaired = describe(copy, members, shapes=seen.shapes, raw_sha256=raw_sha256)
    return _Seen(
        problems=seen.problems + seen.bad, bad=seen.bad, good=len(seen.good), place=job.repair or "", repaired=repaired
    )


@dataclass
class _Look:
    """One folder of shards that is looked at."""

    folder: Path
    index: Index | None
    jobs: list[_Job]
    problems: list[str]
    repair: Path | None

    @staticmethod
    def at(folder: Path, repair: Path | None) -> _Look:
        """What is to be looked at there, and what is wrong at first sight."""
        problems = []
        index = None
        path = folder / "index.json"
        if path.exists():
            try:
                index = Index.model_validate_json(path.read_bytes())
            except (OSError, ValidationError):
                problems.append(f"{path.name}: damaged; `ppcl-data index` writes a new one")
        entries = {entry.name: entry for entry in index.shards} if index else {}
        there = {path.name for path in folder.glob("*.tar")}
        order = [*entries, *sorted(there - entries.keys())]
        problems += [f"{name}: missing" for name in order if name not in there]
        problems += [f"{name}: not in the index" for name in order if index and name not in entries]
        if index and index.settings and folder.name == "encoded":
            problems += _wrong_with_texts(folder / TEXTS)
        if repair is not None:
            repair.mkdir(parents=True, exist_ok=True)
        place = str(repair) if repair is not None else None
        jobs = [_Job(str(folder / name), entries.get(name), place) for name in order if name in there]
        return _Look(folder, index, jobs, problems, repair)

    def finish(self, seen: list[_Seen]) -> None:
        """What lies beside the copies of the shards."""
        assert self.repair is not None
        old = self.index or Index(shards=[])
        skipped = dict.fromkeys(old.skipped + [line for shard in seen for line in shard.bad])
        shards = [shard.repaired for shard in seen if shard.repaired is not None]
        for stray in {path.name for path in self.repair.glob("*.tar")} - {entry.name for entry in shards}:
            (self.repair / stray).unlink()  # a run that was killed left it, and its original has gone since
        if not _wrong_with_texts(self.folder / TEXTS):
            shutil.copyfile(self.folder / TEXTS, self.repair / TEXTS)
        Index(shards=shards, settings=old.settings, skipped=list(skipped)).write(self.repair / "index.json")


def _wrong_with_texts(path: Path) -> list[str]:
    """What is wrong with what all encoded samples share."""
    try:
        Texts.read(path.read_bytes())
    except FileNotFoundError:
        return [f"{path.name}: missing; `ppcl-data encode` writes it"]
    except ValueError as fault:
        return [f"{path.name}: {fault}; delete it and run `ppcl-data encode`"]
    return []
