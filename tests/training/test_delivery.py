"""Micro-batches arrive as the stream makes them, and on time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.data.batch import Size
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.noising import NoisyBatch, NoisyStream
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.delivery import Deliveries, send

CPU = torch.device("cpu")


def micro_batches(path: Path, count: int) -> list[NoisyBatch]:
    recipe = load_recipe(path)
    stream = NoisyStream(recipe, open_teacher(recipe).call, "train", 2)
    return [batch for _, batch in islice(stream.take(0, 1), count)]


def test_what_is_delivered_is_the_stream(new_run: Callable[..., Path]) -> None:
    expected = micro_batches(new_run("qwen"), 8)
    delivered = Deliveries(iter(expected), CPU, ahead=8)
    for batch in expected:
        own = next(delivered)
        delivered.send_next()
        expect_same(own, batch)
        if batch is expected[-2]:
            break
    masks = {batch.arguments["encoder_hidden_states_mask"] is None for batch in expected}
    assert masks == {True, False}, "both kinds are among them"


def test_nothing_is_read_beyond_what_will_be_trained_on(new_run: Callable[..., Path]) -> None:
    read = 0

    def counted(batches: list[NoisyBatch]) -> Iterator[NoisyBatch]:
        nonlocal read
        for batch in batches:
            read += 1
            yield batch

    delivered = Deliveries(counted(micro_batches(new_run("qwen"), 3)), CPU, ahead=2)
    seen = []
    for _ in range(2):
        next(delivered)
        delivered.send_next()
        delivered.send_next()  # no more than one is under way
        seen.append(read)
    assert seen == [2, 2]
    next(delivered)  # somebody wants it after all
    assert read == 3


@dataclass(frozen=True)
class Parcel:
    """Trees of tensors, and what is no tensor."""

    tree: Any
    size: Size
    target: Tensor


def test_what_is_sent_arrives_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the meta device, where one sees that it has left; on the CPU, whatever is no tensor stays what it is."""
    numbers = torch.arange(3)
    shapes = [[(1, 4, 4)]]
    tree = {"hidden": numbers, "shapes": shapes, "nested": [(numbers + 1, None)], "word": "text"}
    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    accelerator = SimpleNamespace(pin_memory=pin_memory)
    monkeypatch.setattr("ppcl_ds.training.delivery.get_accelerator", lambda: accelerator)

    away = send(Parcel(tree, Size(8, 4), numbers.float()), torch.device("meta"))
    assert isinstance(away, Parcel)
    found = away.tree["hidden"], away.tree["nested"][0][0], away.target
    assert all(tensor.is_meta and tensor.shape == (3,) for tensor in found)
    assert [tensor.dtype for tensor in found] == [torch.int64, torch.int64, torch.float32]
    assert len(pinned) == 3, "a copy from ordinary memory would be waited for"
    assert (away.tree["shapes"], away.tree["nested"][0][1], away.tree["word"]) == (shapes, None, "text")
    assert away.size == Size(8, 4)

    here = send(Parcel(tree, Size(8, 4), numbers.float()), CPU)
    assert here.tree["hidden"] is numbers
    assert len(pinned) == 3, "what is there already is not copied"


def expect_same(own: NoisyBatch, other: NoisyBatch) -> None:
    mine, theirs = (pytree.tree_flatten((batch.arguments, batch.target, batch.size)) for batch in (own, other))
    assert mine[1] == theirs[1]
    for one, another in zip(mine[0], theirs[0], strict=True):
        assert torch.equal(one, another) if isinstance(one, Tensor) else one == another
