"""The exchange: every stage receives its units' tensors of all micro-batches, bit for bit.

Run as a module, this file is one of the two ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.training.exchange import Exchange
from ppcl_ds.units.unit import UnitBatch
from tests.ranks import run_ranks

UNITS = [["first", "second"], ["third"]]
TEXT_LENGTHS = [5, 9]


def batches(rank: int) -> dict[str, UnitBatch]:
    """What the teacher's forward on this rank gave: units share conditioning and boundaries, as real ones do."""
    generator = torch.Generator().manual_seed(rank)
    length = TEXT_LENGTHS[rank]

    def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    image, text = noise(2, 16, 8), noise(2, length, 8).bfloat16()
    rotary = (noise(16, 4, dtype=torch.complex64), noise(length, 4, dtype=torch.complex64))
    mask = torch.arange(length) < torch.tensor([[length], [3]])
    shared: dict[str, Any] = {
        "temb": noise(2, 8),
        "image_rotary_emb": rotary,
        "encoder_hidden_states_mask": mask,
        "joint_attention_kwargs": None,
    }
    odd: dict[str, Any] = {
        "nested": {"deep": (None, [torch.arange(3, dtype=torch.int32), ("word", torch.tensor(rank + 0.5).half())])},
        "bools": torch.tensor([True, False, rank == 0]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "long": torch.tensor([[2**40 + rank]]),
        "double": noise(3, dtype=torch.float64) * 1e-300,
        "not finite": torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]),
        "a scalar": torch.tensor(rank),
        "nothing in it": torch.empty(0, 4),
        "turned": noise(4, 6).T,
        "repeated": noise(1, 6).expand(5, 6),
        "only on one rank": noise(2) if rank else None,
        "numbers": (rank, 2.5, True, "text"),
    }
    return {
        "first": UnitBatch({"image": image, "text": text}, shared, {"image": noise(2, 16, 8)}, mask),
        "second": UnitBatch({"image": image, "text": text}, shared | odd, {"text": noise(2, length, 8)}, mask),
        "third": UnitBatch({"image": noise(2, 16, 8), "text": text}, shared | odd, {"image": image}, None),
    }


def be_a_rank(folder: Path) -> None:
    """Three rounds of exchange, so that one round leaves nothing after for the next."""
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    for together in (False, True):
        exchange = Exchange(group, group, rank, UNITS, together)
        for _ in range(3):
            received = list(exchange(batches(rank)))
        fields = [{name: vars(batch) for name, batch in each.items()} for each in received]
        copies: dict[int, Tensor] = {}  # of the views into what was received; what is one tensor stays one

        def copied(tensor: Tensor, copies: dict[int, Tensor] = copies) -> Tensor:
            return copies.setdefault(id(tensor), tensor.clone())

        fields = pytree.tree_map_only(Tensor, copied, fields)
        torch.save(fields, folder / f"rank{rank}-{together}.pt")
    dist.barrier()
    dist.destroy_process_group()


Received = list[list[dict[str, dict[str, Any]]]]
"""By stage, by rank that sent: unit name -> the batch's fields."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exchange")
    run_ranks("tests.training.test_exchange", made)
    return made


def read(folder: Path, rank: int, together: bool) -> Any:
    return torch.load(folder / f"rank{rank}-{together}.pt", weights_only=False)


@pytest.fixture(scope="module", params=[False, True], ids=["one by one", "together"])
def received(folder: Path, request: pytest.FixtureRequest) -> Received:
    return [read(folder, rank, request.param) for rank in range(2)]


def assert_same(mine: Any, sent: Any, path: str) -> None:
    """Equal to the last bit, in structure, type, shape and value."""
    assert type(mine) is type(sent), path
    if isinstance(sent, Tensor):
        assert (mine.dtype, mine.shape) == (sent.dtype, sent.shape), path
        assert as_bytes(mine) == as_bytes(sent), path
    elif isinstance(sent, dict):
        assert mine.keys() == sent.keys(), path
        for key in sent:
            assert_same(mine[key], sent[key], f"{path}/{key}")
    elif isinstance(sent, (list, tuple)):
        assert len(mine) == len(sent), path
        for number, (a, b) in enumerate(zip(mine, sent, strict=True)):
            assert_same(a, b, f"{path}/{number}")
    else:
        assert mine == sent, path


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


@pytest.mark.parametrize("sender", [0, 1])
@pytest.mark.parametrize("stage", [0, 1])
def test_batches_arrive_exactly_as_they_were_sent(received: Received, stage: int, sender: int) -> None:
    sent = batches(sender)
    assert list(received[stage][sender]) == UNITS[stage]
    for name, fields in received[stage][sender].items():
        assert_same(fields, vars(sent[name]), name)


def test_every_stage_hears_from_every_rank_in_order(received: Received) -> None:
    for stage, names in enumerate(UNITS):
        lengths = [[each[name]["inputs"]["text"].shape[1] for each in received[stage]] for name in names]
        assert lengths == [TEXT_LENGTHS] * len(names)


def shared_tensors(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors that `batches` puts into both of the first stage's units."""
    yield from ((first["inputs"][stream], second["inputs"][stream]) for stream in ("image", "text"))
    yield from zip(*(p["conditioning"]["image_rotary_emb"] for p in (first, second)), strict=True)
    for name in ("temb", "encoder_hidden_states_mask"):
        yield first["conditioning"][name], second["conditioning"][name]
    yield first["text_mask"], second["text_mask"]
    yield first["text_mask"], first["conditioning"]["encoder_hidden_states_mask"]


@pytest.mark.parametrize("sender", [0, 1])
def test_a_tensor_that_two_units_of_a_stage_share_arrives_once(received: Received, sender: int) -> None:
    first, second = received[0][sender]["first"], received[0][sender]["second"]
    pairs = list(shared_tensors(first, second))
    assert len(pairs) == 8
    assert all(mine is other for mine, other in pairs)
    assert first["targets"]["image"] is not first["inputs"]["image"]


def test_with_one_stage_nothing_is_sent() -> None:
    assert not dist.is_initialized()  # so that any communication would fail
    nobody: Any = None
    own = batches(0)
    [kept] = Exchange(nobody, nobody, 0, [["first", "second", "third"]], False)(own)
    assert kept.keys() == own.keys()
    assert all(kept[name] is own[name] for name in own)


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
