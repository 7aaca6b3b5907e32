"""`ppcl-data encode`: raw shards become encoded ones, so that no encoder has to run while a model trains.

Any number of processes, on any number of machines, may encode the shards of one folder. They need not know of each
other: each shard gets its name when it is whole, its entry in `entries/` comes next, and whoever finds the entries of
all shards writes the index.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from data_tools import shard
from data_tools.coder import Coder
from data_tools.samples import (
    SOURCE,
    image_suffix,
    latent_shape,
    members_of,
    read_parts,
    tensor_shapes,
    write_partial,
)
from data_tools.summary import Summary, check_bad, named, write_log
from data_tools.work import digest_of, own_part, partial_name, spread, sweep, worker_number, write_shared
from ppcl_ds.atomic import sha256
from ppcl_ds.console import Advance
from ppcl_ds.data import images
from ppcl_ds.data.index import Index, Member, ShardEntry, describe, scan
from ppcl_ds.data.stream import TEXTS
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import Data
from ppcl_ds.sections import Teacher as TeacherSection
from ppcl_ds.teacher.encoding import Encoder, largest

COMMAND = "ppcl-data encode"


def encode(recipe: Recipe, keep_images: bool = False, workers: int = 1, part: str = "") -> Summary:
    """Write `data.shards/encoded/`: one shard for each raw one, `texts.safetensors` and `index.json`.

    Every sample has the members KEY.txt, its main caption, KEY.json, all of its captions where it has several, and
    KEY.safetensors, in bfloat16, see `ppcl_ds.data.stored`. Samples that cannot be encoded are left out and named.

    A run that was killed goes on at the shard where it was; shards are encoded again when the recipe's encoders or
    their raw shard have changed, and only then. Any part may be run any number of times, and at any time.

    Args:
        recipe: the run; its teacher's pipeline encodes.
        keep_images: store the original image beside its latents.
        workers: processes that encode, each with encoders of its own.
        part: `i/n`, every n-th shard; empty: as Slurm says, else all. The ranks of torchrun divide it further.

    Raises:
        UserError: there are no raw shards, one is not as its index says, an encoder cannot be had, or more than
            `data.max_bad_fraction` of the samples cannot be encoded.
    """
    data, teacher = recipe.data, recipe.teacher
    number, parts = own_part(part)
    raw, encoded = data.shards / "raw", data.shards / "encoded"
    source = Index.read(raw / "index.json", shard.COMMAND)
    settings: dict[str, object] = data.model_dump(mode="json", include={"images"})
    settings |= teacher.model_dump(mode="json", include={"path", "component", "options"})
    settings["keep_images"] = keep_images
    folder = _Folder(encoded, digest_of(settings), source.shards)
    folder.sweep()
    index = folder.index(settings)
    if index is not None:
        return Summary(
            f"{encoded}: already encoded, and neither the encoders nor the raw shards have changed",
            _figures(index.samples, 0, index.skipped, []),
            shard.news(data) if number == 1 else [],
        )
    (encoded / "entries").mkdir(parents=True, exist_ok=True)
    (encoded / "index.json").unlink(missing_ok=True)

    own = source.shards[number - 1 :: parts]
    if number == 1 and folder.done(TEXTS) is None:
        _write_texts(folder, data, teacher)
    jobs = [
        _Job(entry, data, teacher, keep_images, folder.settings) for entry in own if folder.done(entry.name) is None
    ]
    total = sum(entry.samples for entry in source.shards)
    log = encoded / "skipped.log"
    bad = [line for entry in own if (known := folder.done(entry.name)) for line in known.skipped]

    def check(done: _Done) -> None:
        bad.extend(done.skipped)
        check_bad(bad, total, data.max_bad_fraction, log)

    check_bad(bad, total, data.max_bad_fraction, log)
    spread(
        _encode, jobs, "encoding", workers, check=check, done=sum(e.samples for e in own) - sum(j.samples for j in jobs)
    )

    every = {entry.name: folder.done(entry.name) for entry in source.shards}
    missing = [name for name, done in every.items() if done is None]
    if missing or folder.done(TEXTS) is None:
        figures = _figures(sum(entry.samples for entry in own) - len(bad), len(jobs), bad, missing)
        others = f"{len(missing)} shards of other parts are still missing" if missing else f"{TEXTS} is still missing"
        return Summary(
            f"{encoded}: part {number}/{parts} is through; {others}", figures, named(bad, encoded / "entries")
        )
    entries = [done for done in every.values() if done is not None]
    skipped = [line for done in entries for line in done.skipped]
    check_bad(skipped, total, data.max_bad_fraction, log)
    index = Index(shards=[done.entry for done in entries if done.entry], settings=settings, skipped=skipped)
    folder.publish(index)
    longer = sum(done.longer for done in entries)
    cut = [f"{longer} captions are longer than the text encoder reads, and were cut"] if longer else []
    return Summary(
        f"{encoded}: {index.samples} samples (shards: {len(index.shards)})",
        _figures(index.samples, len(jobs), skipped, []),
        cut + named(skipped, log) + shard.news(data),
    )


class _Done(BaseModel):
    """What `entries/NAME.json` says: a shard, or what all samples share, is encoded."""

    settings: str
    """Digest of what it was encoded with."""
    raw_sha256: str
    entry: ShardEntry | None
    """None where none of its samples could be encoded."""
    skipped: list[str]
    longer: int = 0
    """Captions that were cut."""


@dataclass
class _Folder:
    """`encoded/`, in which other processes may be at work too."""

    path: Path
    settings: str
    raw: Sequence[ShardEntry]

    @functools.cached_property
    def _sums(self) -> dict[str, str]:
        return {entry.name: entry.sha256 for entry in self.raw}

    def done(self, name: str) -> _Done | None:
        """What is known of a shard that need not be encoded again."""
        try:
            done = _Done.model_validate_json((self.path / "entries" / f"{name}.json").read_bytes())
        except (OSError, ValidationError):
            return None
        same = (done.settings, done.raw_sha256) == (self.settings, self._sums.get(name, ""))
        return done if same and (done.entry is None or done.entry.is_in(self.path)) else None

    def index(self, settings: dict[str, object]) -> Index | None:
        """The index, if all is done."""
        if not (self.path / "index.json").exists():
            return None
        index = Index.read(self.path / "index.json", COMMAND)
        every = [self.done(entry.name) for entry in self.raw]
        same = index.settings == settings and index.shards == [done.entry for done in every if done and done.entry]
        return index if same and None not in every and self.done(TEXTS) else None

    def write_done(self, name: str, done: _Done) -> None:
        """Say that a shard is encoded."""
        write_shared(self.path / "entries" / f"{name}.json", done.model_dump_json().encode())

    def sweep(self) -> None:
        """Remove leftovers of killed runs."""
        sweep(self.path)
        sweep(self.path / "entries")

    def publish(self, index: Index) -> None:
        """Write the index, and remove what is no part of it: shards of earlier settings, leftovers of killed runs."""
        self.sweep()
        names = {entry.name for entry in self.raw} | {TEXTS}
        for entry in (self.path / "entries").glob("*.json"):
            name = entry.name.removesuffix(".json")
            if name not in names:
                (self.path / name).unlink(missing_ok=True)
                entry.unlink(missing_ok=True)
        if index.skipped:
            write_log(self.path / "skipped.log", index.skipped)
        else:
            (self.path / "skipped.log").unlink(missing_ok=True)
        whole = partial_name(self.path / "index.json")
        index.write(whole)
        os.replace(whole, self.path / "index.json")


@dataclass(frozen=True)
class _Job:
    """A raw shard to encode."""

    raw: ShardEntry
    data: Data
    teacher: TeacherSection
    keep_images: bool
    settings: str

    @property
    def samples(self) -> int:
        return self.raw.samples

    @property
    def key(self) -> str:
        return self.raw.name


@contextmanager
def _telling_when_memory_ends() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU has too little memory for the encoders; use fewer `--workers` or a smaller `data.images.size`"
        ) from None


@_telling_when_memory_ends()
def _encode(job: _Job, advance: Advance) -> _Done:
    """Encode one raw shard, whole or not at all."""
    raw, encoded = job.data.shards / "raw", job.data.shards / "encoded"
    path, target = raw / job.raw.name, encoded / job.raw.name
    folder = _Folder(encoded, job.settings, [job.raw])
    if known := folder.done(job.raw.name):  # by another process, meanwhile
        advance(job.samples)
        return known
    members = _checked(path, job.raw)
    encoder = _encoder(job.teacher.model_dump_json(), _device(), any(map(_has_images, members)))
    coder = Coder(encoder, _buckets(job.data, encoder), job.data.images.frames, job.keep_images)
    skipped: list[str] = []
    shapes: dict[str, list[int]] = {}
    written = 0

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal written
        with path.open("rb") as file:
            for item in coder.items(((member, read_parts(file, member)) for member in members), path.name):
                advance(1)
                if item.why:
                    skipped.append(f"{item.name}: {item.why}")
                    continue
                shapes.setdefault(latent_shape(tensor_shapes(item.parts["safetensors"])), []).append(written)
                written += 1
                yield item.key, item.parts

    # Described before it has its name: what lies there afterwards may be another process's.
    partial = partial_name(target)
    write_partial(partial, samples())
    entry = None
    if written:
        entry = describe(partial, members_of(partial), shapes=shapes, raw_sha256=job.raw.sha256)
        entry = entry.model_copy(update={"name": target.name})
        assert entry.samples == written
    if known := folder.done(target.name):  # its entry is of its own bytes
        partial.unlink()
        return known
    if written:
        os.replace(partial, target)
    else:
        partial.unlink()
        target.unlink(missing_ok=True)
    done = _Done(settings=job.settings, raw_sha256=job.raw.sha256, entry=entry, skipped=skipped, longer=coder.longer)
    folder.write_done(target.name, done)
    return done


def _checked(path: Path, entry: ShardEntry) -> list[Member]:
    """The samples of a raw shard, which must be what its index says."""
    if not entry.is_in(path.parent):
        raise UserError(f"{path} is missing or cut short; run `{shard.COMMAND} RECIPE`")
    with path.open("rb") as file:
        members, problems = scan(file)
    if problems or len(members) != entry.samples:
        raise UserError(
            f"{path} holds {len(members)} samples, its index says {entry.samples}"
            f"{f' ({problems[0]})' if problems else ''}; delete it and run `{shard.COMMAND} RECIPE`"
        )
    if sha256(path) != entry.sha256:
        raise UserError(f"{path} has changed since it was written; delete it and run `{shard.COMMAND} RECIPE`")
    return members


@functools.lru_cache(maxsize=1)
def _encoder(teacher: str, device: str, images: bool) -> Encoder:
    """Loaded once in a process.

    Args:
        teacher: the recipe's section, as JSON.
        images: whether images will be encoded, too.
    """
    settings = TeacherSection.model_validate_json(teacher)
    return Encoder(settings.folder, settings.component, settings.options, device, images)


def _has_images(member: Member) -> bool:
    return bool(image_suffix(member.parts) or image_suffix(member.parts, SOURCE))


def _device() -> str:
    """Where encoders run: the GPU that torchrun gave this process, else the worker's own, in turn, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', worker_number())) % torch.cuda.device_count()}"


def _buckets(data: Data, encoder: Encoder) -> images.Buckets:
    """The recipe's, in steps that suit the pipeline.

    Raises:
        UserError: the recipe's size is no multiple of them.
    """
    usual = 2 * encoder.factor if encoder.factor == 1 else max(64, 2 * encoder.factor)
    sizes, step = data.images, data.images.step or usual
    if sizes.size % step:
        raise UserError(
            f"data.images.size {sizes.size} is not a multiple of {step}; set data.images.step, or another size"
        )
    return images.Buckets(sizes.size, sizes.max_aspect, step)


@_telling_when_memory_ends()
def _write_texts(folder: _Folder, data: Data, teacher: TeacherSection) -> None:
    path = folder.path / TEXTS
    images = not data.sizes or any(map(_has_images, _checked(data.shards / "raw" / folder.raw[0].name, folder.raw[0])))
    encoder = _encoder(teacher.model_dump_json(), _device(), images)
    write_shared(path, encoder.texts(largest(data, encoder.layouts)))
    entry = describe(path, [])
    folder.write_done(TEXTS, _Done(settings=folder.settings, raw_sha256="", entry=entry, skipped=[]))


def _figures(samples: int, encoded: int, skipped: list[str], missing: list[str]) -> dict[str, object]:
    return {"samples": samples, "shards_encoded_now": encoded, "skipped": skipped, "missing_shards": missing}
