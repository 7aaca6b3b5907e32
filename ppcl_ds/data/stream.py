"""From shards to micro-batches: numbered, the same for any number of ranks and workers, resumable at any number.

Shapes: C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ppcl_ds import launch
from ppcl_ds.data.batch import Batch, Sample
from ppcl_ds.data.index import split_entries
from ppcl_ds.data.order import Numbers, Order, Settings, buckets_of, is_alone
from ppcl_ds.data.shards import BadSampleError, Shards
from ppcl_ds.data.stored import EMPTY, Stored, Texts
from ppcl_ds.errors import UserError, brief, problem
from ppcl_ds.sections import Data

TEXTS = "texts.safetensors"
"""Beside the encoded shards: what all samples share, see `Texts`."""

_EARLIER = "empty.safetensors"
"""What earlier releases wrote instead."""

FIXED = (
    "seed",
    "noise",
    "data.images",
    "data.window",
    "data.real_share",
    "teacher.precision",
    "teacher.component",
    "teacher.options",
)
"""Recipe keys that samples, their order and their noise depend on: whatever was begun keeps them to its end."""

_NAMED = 10
"""Bad samples that an error message names; the log names all."""


class MicroBatchStream:
    """Micro-batches number 0, 1, 2, ... without end, in one order for the whole run; see `Order`.

    All there is to resume from is the number of the next micro-batch. A sample that cannot be used is skipped: another
    one of its shape, always the same, takes its place, so that numbers and sizes of micro-batches stay what they are.

    Args:
        data: the recipe's section.
        split: `train` in shuffled order, read ahead by `data.workers` processes; `heldout` in stored order.
        micro_batch: samples in a micro-batch.
        seed: of the order, and of the caption that is taken where a sample has several.
        log: file that names bad samples; lines are appended.
        lanes: see `Order`; of many ranks, each should read some lanes.
        captions: whether captions without an image count, too; of micro-batches without latents, or see `sample`.

    Raises:
        UserError: nothing is encoded yet, a shard is missing or cut short, or the split is empty.
    """

    def __init__(
        self,
        data: Data,
        split: Literal["train", "heldout"],
        micro_batch: int,
        seed: int,
        log: Path,
        lanes: int = 1,
        captions: bool = False,
    ) -> None:
        entries = split_entries(data, split)
        self.workers = data.workers if split == "train" else 0
        self.limit, self.log = data.max_bad_fraction, log
        self.cache = tempfile.TemporaryDirectory(prefix="ppcl-shards-") if data.address else None
        shards = Shards(
            entries,
            data.address or data.shards / "encoded",
            Path(self.cache.name) if self.cache else None,
            int(data.cache),
        )
        counts = [entry.samples for entry in entries]
        for entry in entries:
            if sum(map(len, entry.shapes.values())) != entry.samples:
                raise UserError(f"{entry.name}: no latents in its index; `ppcl-data encode` or `index` writes one")
        buckets, shapes = buckets_of([entry.shapes for entry in entries], counts)
        self.decoder = _Decoder(shards, buckets, shapes, seed)
        self.settings = Settings(seed, shuffle=split == "train", window=data.window, lanes=lanes)
        self.shards = np.repeat(np.arange(len(entries)), counts)
        images = np.array([captions or not is_alone(shape) for shape in shapes])
        (self.numbers,) = np.nonzero(images[buckets])
        if not len(self.numbers):
            raise UserError(
                f"{data.shards}: its {split} samples are captions alone; set `trajectories`, or give images"
            )
        # The buckets that count, numbered anew.
        own = (np.cumsum(images) - 1)[buckets[self.numbers]]
        self.order = Order(self.shards[self.numbers], own, micro_batch, self.settings)
        self.bad: set[str] = set()
        """Samples that were skipped since this process began, `shard:key: why`; see `share`."""
        self.news: list[str] = []
        self._orders: dict[int, tuple[Numbers, Order]] = {}

    def __len__(self) -> int:
        return len(self.decoder.shards)

    def take(self, start: int, stride: int) -> Iterator[tuple[int, Batch]]:
        """Yield micro-batches number start, start + stride, start + 2 * stride, ... and their numbers, for ever.

        Rank r of W calls `take(r, W)`. Nothing but these micro-batches is read.

        Yields:
            The number, and the micro-batch: one size, float32 on the CPU.

        Raises:
            UserError: a shard cannot be opened, or more than `data.max_bad_fraction` of the samples are bad.
        """
        numbers = ((number, self.numbers[self.order[number]]) for number in count(start, stride))
        # Not forked: this process has threads and sockets that a copy must not hold.
        context = multiprocessing.get_context("forkserver") if self.workers else None
        if context:
            context.set_forkserver_preload([__name__])
        reads: DataLoader[_Read] = DataLoader(
            self.decoder,
            batch_size=None,
            sampler=numbers,
            num_workers=self.workers,
            multiprocessing_context=context,
            worker_init_fn=launch.end_with_parent,
        )
        batches = iter(reads)
        while True:
            try:
                read = next(batches)
            except (RuntimeError, OSError) as fault:  # so torch says that a worker is gone
                why = brief(fault)
                raise UserError(f"a process that reads the shards has ended ({why}); try fewer data.workers") from None
            self._note(read.bad)
            if read.batch is None:
                raise UserError(read.fault)
            yield read.number, read.batch

    def first(self) -> Batch:
        """The first stored sample that can be used."""
        return self._now(0, self.numbers[:1])

    def batch(self, number: int) -> Batch:
        """Micro-batch `number`, read when it is asked for."""
        return self._now(number, self.numbers[self.order[number]])

    def sample(self, bucket: int, number: int) -> Sample:
        """Sample 0, 1, 2, ... of a bucket, without end, in an order of its own; number n is of lane n mod lanes."""
        if bucket not in self._orders:
            (members,) = np.nonzero(self.decoder.buckets == bucket)
            order = Order(self.shards[members], np.zeros(len(members), dtype=np.int64), 1, self.settings)
            self._orders[bucket] = members, order
        members, order = self._orders[bucket]
        return self._now(number, members[order[number]]).samples[0]

    def _now(self, number: int, samples: Numbers) -> Batch:
        read = self.decoder[number, samples]
        self._note(read.bad)
        if read.batch is None:
            raise UserError(read.fault)
        return read.batch

    def _note(self, bad: list[str]) -> None:
        new = [line for line in dict.fromkeys(bad) if line not in self.bad]
        if not new:
            return
        self.bad |= set(new)
        self.news += new
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as file:
                file.write("".join(f"{line}\n" for line in new))
        except OSError as fault:
            print(f"warning: {self.log}: {fault.strerror}; bad samples: {'; '.join(new)}", file=sys.stderr, flush=True)
        self._check()

    def share(self) -> int:
        """Learn which samples other ranks have skipped; every rank must call it. Returns how many all of them have.

        Raises:
            UserError: they are more than `data.max_bad_fraction` of an epoch.
        """
        for news in launch.all_gather(self.news):
            self.bad |= set(news)
        self.news = []
        self._check()
        return len(self.bad)

    def _check(self) -> None:
        bad = len(self.bad)
        if bad > self.limit * len(self):
            named = "; ".join(sorted(self.bad)[:_NAMED])
            raise UserError(
                f"{bad} of {len(self)} samples cannot be used, more than data.max_bad_fraction ({self.limit:g}): "
                f"{named}{'; ...' if bad > _NAMED else ''}; {self.log} names all; look for more with `ppcl-data verify`"
            )


@dataclass(frozen=True)
class _Read:
    """What a worker sends; a fault travels as words, so that it arrives as it left."""

    number: int
    batch: Batch | None
    bad: list[str]
    fault: str = ""


class _Decoder(Dataset[_Read]):
    """Samples by number to micro-batches; what a worker process runs."""

    def __init__(self, shards: Shards, buckets: np.ndarray, shapes: list[str], seed: int) -> None:
        self.shards, self.buckets, self.shapes, self.seed = shards, buckets, shapes, seed
        self.known_bad: dict[int, str] = {}

    def __getitem__(self, asked: tuple[int, np.ndarray]) -> _Read:
        number, samples = asked
        bad: list[str] = []
        random = _random(self.seed, number)
        try:
            rows = [self._usable(int(sample), bad, random) for sample in samples]
        except UserError as fault:
            return _Read(number, None, bad, str(fault))
        return _Read(number, Batch(tuple(rows)), bad)

    def _usable(self, sample: int, bad: list[str], random: np.random.RandomState) -> Sample:
        """The sample itself, or another one of its bucket that can be used."""
        draw = random.random_sample()  # one for each place, whoever takes it
        for number in self._candidates(sample):
            if number not in self.known_bad:
                try:
                    return self._decode(number, draw)
                except BadSampleError as fault:
                    self.known_bad[number] = str(fault)
            bad.append(self.known_bad[number])
        shape = self.shapes[self.buckets[sample]]
        raise UserError(f"no sample of shape {shape} can be used; {bad[0]}; run `ppcl-data verify`")

    def _candidates(self, sample: int) -> Iterator[int]:
        """The sample, then others of its bucket from a place on that is its own, or one would stand in for many."""
        yield sample
        start = int(_random(self.seed, sample).randint(len(self.buckets)))
        for number in chain(range(start, len(self.buckets)), range(start)):
            if number != sample and self.buckets[number] == self.buckets[sample]:
                yield number

    def _decode(self, number: int, draw: float) -> Sample:
        name, parts = self.shards.read(number)
        try:
            return decode(name, parts, draw, self.shapes[self.buckets[number]])
        except ValueError as fault:
            raise BadSampleError(problem(name, fault)) from None


def _random(*seed: int) -> np.random.RandomState:
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))


def decode(name: str, parts: dict[str, bytes], draw: float = 0.0, shape: str = "") -> Sample:
    """One encoded sample, float32.

    Args:
        name: `shard:key`.
        parts: what each suffix of it holds.
        draw: in [0, 1), says which caption is taken where there are several.
        shape: of its latents, as in `16x128x96`, if that is known.

    Raises:
        ValueError: it cannot be used; the message says why.
    """
    try:
        stored = Stored.read(parts["safetensors"])
        texts = {"": parts["txt"].decode()} | dict(json.loads(parts.get("json", b"{}")))
    except KeyError as fault:
        raise ValueError(f"no .{fault.args[0]}") from None
    except UnicodeDecodeError:
        raise ValueError("damaged (its .txt is not UTF-8)") from None
    except (TypeError, RecursionError, json.JSONDecodeError) as fault:
        raise ValueError(f"damaged (its .json: {fault})") from None
    own = "x".join(map(str, stored.latents.shape))
    if own != (shape or own):
        raise ValueError(f"latents of shape {own}, not {shape}")
    names = sorted(name for name in stored.prompts if name != EMPTY)
    caption = names[int(draw * len(names))]
    prompt = stored.prompts[caption]
    if not all(bool(tensor.isfinite().all()) for tensor in (stored.latents, *prompt.tensors())):
        raise ValueError("NaN or infinity in its latents or prompt")
    key, said = name.partition(":")[2], str(texts.get(caption, ""))
    return Sample(key, stored.latents[None], stored.size, prompt, said, stored.prompts.get(EMPTY))


def read_texts(data: Data) -> Texts:
    """What all encoded samples share.

    Raises:
        UserError: it is not there, or it is damaged.
    """
    path = data.shards / "encoded" / TEXTS
    if not path.is_file() and path.with_name(_EARLIER).is_file():
        raise UserError(f"{path.parent} was encoded by an earlier release; run `ppcl-data encode RECIPE` again")
    if not path.is_file():
        raise UserError(f"{path} is missing; run `ppcl-data encode RECIPE` first")
    try:
        return Texts.read(path.read_bytes())
    except ValueError as fault:
        raise UserError(f"{path}: {brief(fault)}; delete it and run `ppcl-data encode RECIPE`") from None


def has_images(data: Data, split: Literal["train", "heldout"]) -> bool:
    """Whether a split has any sample that is not a caption alone.

    Raises:
        UserError: it is not there.
    """
    return any(not is_alone(shape) for entry in split_entries(data, split) for shape in entry.shapes)


def check_data(
    data: Data, *, train: bool = True, heldout: bool = True, section: str = "", images: bool = False
) -> None:
    """That the encoded shards of the splits that will be read are there, and what they share with them.

    Args:
        section: of the recipe, of a training.
        images: whether it reads images.

    Raises:
        UserError: one line that says what is missing.
    """
    if train and not has_images(data, "train") and images:
        raise UserError(f"{data.shards} holds captions alone; set {section}.trajectories: {{}}, or give images")
    if heldout:
        split_entries(data, "heldout")
    read_texts(data)
