"""The order in which a run reads its samples: a function of the seed, the epoch and the index alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """Of an order.

    Attributes:
        shuffle: False keeps the stored order, bucket after bucket, in every epoch.
        window, lanes: see `Order`.
    """

    seed: int
    shuffle: bool = True
    window: int = 2048
    lanes: int = 1


class Order:
    """Which samples micro-batch 0, 1, 2, ... holds, without end.

    Samples of one bucket (one latent shape) are laid end to end, epoch after epoch, each epoch with every sample once;
    `micro_batch` neighbours are a micro-batch, so one may hold the end of an epoch and the beginning of the next. In
    which order the buckets take turns is drawn anew for each epoch.

    Micro-batch j belongs to lane j mod `lanes`. An epoch shuffles the shards, cuts them into one piece a lane, and
    shuffles the samples of a piece by about `window` places. So whoever reads some of the lanes goes through
    their pieces from one end to the other and needs no other shards: with a lane for each micro-batch of an optimizer
    step, ranks of any number that divides it have a part of the shards each.

    Args:
        shards: shard number of each sample, (N,), ascending.
        buckets: bucket number of each sample, (N,), every number from 0 on in use.
        micro_batch: samples in a micro-batch.
    """

    def __init__(self, shards: Numbers, buckets: Numbers, micro_batch: int, settings: Settings) -> None:
        self.shards, self.buckets, self.micro_batch = shards, buckets, micro_batch
        self.seed, self.shuffle, self.window, self.lanes = astuple(settings)
        self.counts = np.bincount(buckets).tolist()
        # An epoch's order is needed again and again, and with it the one before.
        self._epoch = lru_cache(maxsize=2 * len(self.counts) + 1)(self._make_epoch)
        self._turns = lru_cache(maxsize=3)(self._make_turns)

    def __getitem__(self, number: int) -> Numbers:
        """The samples of micro-batch `number`, (micro_batch,)."""
        epoch = self._epoch_of(number)
        turns, numbers = self._turns(epoch)
        bucket, own = int(turns[number - self._first(epoch)]), int(numbers[number - self._first(epoch)])
        places = range(own * self.micro_batch, (own + 1) * self.micro_batch)
        count = self.counts[bucket]
        return np.array([self._epoch(place // count, bucket)[place % count] for place in places])

    def _first(self, epoch: int) -> int:
        return sum(epoch * count // self.micro_batch for count in self.counts)

    def _epoch_of(self, number: int) -> int:
        # At most one micro-batch a bucket more than whole samples would give.
        guess = number * self.micro_batch // len(self.buckets)
        last = (number + len(self.counts) + 1) * self.micro_batch // len(self.buckets) + 1
        return guess - 1 + bisect_right(range(guess, last + 1), number, key=self._first)

    def _random(self, epoch: int, *more: int) -> np.random.RandomState:
        # RandomState: numpy will never change what it draws, and a run is resumed by drawing it again.
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch, *more])))

    def _make_turns(self, epoch: int) -> tuple[Numbers, Numbers]:
        """Bucket, and number within the bucket, of each micro-batch that is full in `epoch`."""
        full = [range(epoch * n // self.micro_batch, (epoch + 1) * n // self.micro_batch) for n in self.counts]
        turns = np.repeat(np.arange(len(full)), [len(numbers) for numbers in full])
        if self.shuffle:
            self._random(epoch).shuffle(turns)
        own = np.empty_like(turns)
        for bucket, numbers in enumerate(full):
            own[turns == bucket] = numbers
        return turns, own

    def _make_epoch(self, epoch: int, bucket: int) -> Numbers:
        """The samples of a bucket in the order of `epoch`."""
        (samples,) = np.nonzero(self.buckets == bucket)
        if not self.shuffle:
            return samples
        ranks = self._random(epoch, 0).permutation(int(self.shards[-1]) + 1)  # the same for all buckets
        samples = samples[np.argsort(ranks[self.shards[samples]], kind="stable")]
        lanes = self._lanes(epoch, bucket)
        pieces = np.sort(lanes)
        window = self.window * len(samples) / len(self.buckets)  # of all buckets together
        jitter = self._random(epoch, 1, bucket).random_sample(len(samples)) * window
        ordered = np.empty_like(samples)
        ordered[np.argsort(lanes, kind="stable")] = samples[np.lexsort((np.arange(len(samples)) + jitter, pieces))]
        return ordered

    def _lanes(self, epoch: int, bucket: int) -> Numbers:
        """The lane of each place of a bucket's epoch."""
        count = self.counts[bucket]
        own = (epoch * count + np.arange(count)) // self.micro_batch
        own -= own[0]
        # What fills up in the next epoch goes to any lane, as long as it is always the same.
        lanes = np.zeros(int(own[-1]) + 1, dtype=np.int64)
        (full,) = np.nonzero(self._turns(epoch)[0] == bucket)
        lanes[: len(full)] = (self._first(epoch) + full) % self.lanes
        result: Numbers = lanes[own]
        return result


def is_alone(shape: str) -> bool:
    """Whether samples of a bucket are captions without an image: their latents have no channels."""
    return shape.startswith("0x")


def buckets_of(shapes: Sequence[dict[str, list[int]]], counts: Sequence[int]) -> tuple[Numbers, list[str]]:
    """The bucket of every sample, and the latent shape of every bucket, most frequent first.

    Args:
        shapes: of each shard: latent shape -> numbers of the samples that have it.
        counts: samples of each shard.
    """
    totals: dict[str, int] = {}
    for shard in shapes:
        for shape, numbers in shard.items():
            totals[shape] = totals.get(shape, 0) + len(numbers)
    names = sorted(totals, key=lambda shape: (-totals[shape], shape))
    buckets = np.zeros(sum(counts), dtype=np.int64)
    for start, shard in zip(np.cumsum([0, *counts]).tolist(), shapes, strict=False):
        for shape, numbers in shard.items():
            buckets[start + np.array(numbers, dtype=np.int64)] = names.index(shape)
    return buckets, names
