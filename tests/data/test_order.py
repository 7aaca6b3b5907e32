"""Promises of the order: every sample once in an epoch, whoever reads it, and every lane its own shards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_ds.data.order import Order, Settings, buckets_of

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
bucket_choices = st.integers(1, 4).flatmap(lambda count: st.lists(st.integers(0, count - 1), min_size=72, max_size=72))


def make(
    sizes: list[int], choices: list[int], micro_batch: int, seed: int = 0, shuffle: bool = True, lanes: int = 1
) -> Order:
    shards = np.repeat(np.arange(len(sizes)), sizes)
    _, buckets = np.unique(choices[: len(shards)], return_inverse=True)  # every number from 0 on in use
    return Order(shards, buckets, micro_batch, Settings(seed, shuffle, window=5, lanes=lanes))


@settings(max_examples=200, deadline=None)
@given(shard_sizes, bucket_choices, st.integers(1, 7), st.integers(0, 3), st.booleans(), st.integers(1, 5))
def test_every_sample_comes_exactly_once_in_an_epoch(
    sizes: list[int], choices: list[int], micro_batch: int, seed: int, shuffle: bool, lanes: int
) -> None:
    order = make(sizes, choices, micro_batch, seed, shuffle, lanes)
    epochs = 3
    read: list[list[int]] = [[] for _ in order.counts]
    for number in range(epochs * sum(sizes) // micro_batch + len(order.counts)):
        samples = order[number]
        assert len(samples) == micro_batch
        [bucket] = set(order.buckets[samples].tolist())  # one latent shape
        read[bucket] += samples.tolist()
    whole = 0
    for bucket, seen in enumerate(read):
        count = order.counts[bucket]
        everything = np.nonzero(order.buckets == bucket)[0].tolist()
        for start in range(0, len(seen) - count + 1, count):
            assert sorted(seen[start : start + count]) == everything
            whole += 1
        assert len(seen) > (epochs - 1) * count - micro_batch, "no bucket falls after"
    assert whole


@settings(max_examples=100, deadline=None)
@given(shard_sizes, bucket_choices, st.integers(1, 7), st.integers(0, 10**6))
def test_any_number_is_found_without_those_before(
    sizes: list[int], choices: list[int], micro_batch: int, number: int
) -> None:
    """Numbers far into a run cost nothing, and turns follow each other without a gap."""
    order = make(sizes, choices, micro_batch)
    epoch = order._epoch_of(number)
    assert order._first(epoch) <= number < order._first(epoch + 1)
    assert len(order._turns(epoch)[0]) == order._first(epoch + 1) - order._first(epoch)
    assert (order[number] == make(sizes, choices, micro_batch)[number]).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 6), st.integers(0, 5))
def test_a_lane_goes_through_its_own_piece_of_the_shards(
    sizes: list[int], micro_batch: int, lanes: int, epoch: int
) -> None:
    order = make(sizes, [0] * sum(sizes), micro_batch, lanes=lanes)
    first, last = order._first(epoch), order._first(epoch + 1)
    shuffled = order._random(epoch, 0).permutation(len(sizes))
    read: list[set[int]] = [set() for _ in range(lanes)]
    for number in range(first + 1, last):  # the first may hold the end of the epoch before
        read[number % lanes] |= {int(shuffled[shard]) for shard in order.shards[order[number]]}
    for shards in read:
        # Neighbours in the epoch's order of shards; a sample left over for the next epoch may lie between.
        assert max(shards, default=0) - min(shards, default=0) <= len(shards) + micro_batch
    assert sum(map(len, read)) <= len(sizes) + lanes + micro_batch


def test_samples_move_by_about_a_window() -> None:
    order = Order(np.repeat(np.arange(50), 20), np.zeros(1000, dtype=np.int64), 1, Settings(0, window=30))
    ranks = order._random(0, 0).permutation(50)
    stored = np.argsort(ranks[order.shards], kind="stable")
    read = np.array([int(order[number][0]) for number in range(1000)])
    moved = np.abs(np.argsort(read)[stored] - np.arange(1000))
    assert 5 < moved.mean() < 30
    assert moved.max() <= 30


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = make([10, 10], [0] * 20, 1, seed)
        return [int(order[n][0]) for n in range(20 * number, 20 * number + 20)]

    assert len({tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9
    assert epoch(0, 0) != sorted(epoch(0, 0))


def test_stored_order_is_kept_where_it_is_asked_for() -> None:
    order = make([3, 2], [0, 1, 0, 1, 0], 1, shuffle=False)
    assert [int(order[number][0]) for number in range(7)] == [0, 2, 4, 1, 3, 0, 2]


def test_the_order_of_a_seed_stays_what_it_is() -> None:
    """Resuming counts on it: a changed order is a new seed's order, not this one's."""
    order = make([4, 4, 4], [0, 0, 0, 1] * 3, 2, lanes=2)
    assert [order[number].tolist() for number in range(8)] == [
        [9, 8],
        [6, 1],
        [4, 10],
        [0, 2],
        [11, 7],
        [5, 1],
        [5, 0],
        [2, 8],
    ]


@pytest.mark.parametrize("swap", [False, True])
def test_buckets_are_numbered_by_how_many_samples_they_have(swap: bool) -> None:
    shapes = [{"1x2x2": [0, 2], "1x4x2": [1]}, {}, {"1x4x2": [0, 1, 2]}]
    if swap:
        shapes = [dict(reversed(list(shard.items()))) for shard in shapes]
    buckets, names = buckets_of(shapes, [3, 0, 3])
    assert names == ["1x4x2", "1x2x2"]
    assert buckets.tolist() == [1, 0, 1, 0, 0, 0]
