"""A teacher over two nodes of two ranks: gathers stay inside a node, a forward ends where nothing more is wanted.

Run as a module, this file is one of the four ranks.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ppcl_ds import launch
from ppcl_ds.data.batch import Size
from ppcl_ds.recipe import read_deepspeed_file
from ppcl_ds.shipped import shipped
from ppcl_ds.teacher.anatomy import Capture, Wanted
from ppcl_ds.teacher.noising import NoisyBatch
from ppcl_ds.teacher.teacher import Teacher, read_teacher
from tests.calls import answer, call_once, random_arguments
from tests.conftest import TEACHERS
from tests.ranks import environment, fresh

pytestmark = pytest.mark.launcher

FAMILIES = ("qwen", "flux")
NODES, RANKS_PER_NODE = 2, 2
WANTED = {
    "qwen": Wanted(frozenset({0, 2}), frozenset({1, 3})),
    "flux": Wanted(frozenset({1, 4}), frozenset({2, 6})),  # over the line between its two block lists
}


def batch_of(family: str, seed: int) -> NoisyBatch:
    arguments = random_arguments(TEACHERS[family][0], seed, lengths=(5, 3))
    return NoisyBatch(arguments, torch.zeros_like(arguments["hidden_states"]), Size(8, 8))


def note(ran: list[int], block: int, *call: Any) -> None:
    ran.append(block)


def gathered(engine: Any) -> list[str]:
    """Names of the parameters that this rank holds whole now, without the small ones that always are."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return [
        name
        for name, parameter in engine.module.named_parameters()
        if not parameter.ds_persist and parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE
    ]


def be_a_rank(folder: Path) -> None:
    """Load both teachers, run them in part and whole, write down what came out and what stayed gathered."""
    launch.join()
    from ppcl_ds.teacher.sharded import forget_order, load_teacher

    rank = dist.get_rank()
    stock = read_deepspeed_file(shipped("ds_configs/teacher_zero3.json"))
    everything_sharded = stock["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
    found: dict[str, Any] = {}
    for family in FAMILIES:
        teacher, batch = Teacher(folder / family, run=call_once), batch_of(family, rank)
        anatomy = teacher.anatomy
        engine = load_teacher(teacher, stock, torch.float32, None)
        found[f"{family} with small parameters whole"] = answer(engine, batch.arguments)

        engine = load_teacher(teacher, stock | {"zero_optimization": everything_sharded}, torch.float32, None)
        parameters: list[Any] = list(engine.module.parameters())
        found[f"{family} held"] = sum(p.ds_secondary_tensor.numel() for p in parameters)
        found[f"{family} velocity"] = answer(engine, batch.arguments)
        forget_order(engine)
        ran: list[int] = []
        for block in anatomy.blocks:
            anatomy.module(engine.module, block).register_forward_pre_hook(partial(note, ran, block.index))
        left = []
        for _ in range(4):  # the order of fetches is recorded in the second, and fetched along from the third on
            ran.clear()
            capture = read_teacher(engine, teacher, batch, WANTED[family])
            left.append(gathered(engine))
        found[f"{family} capture"], found[f"{family} ran"] = (capture.streams, capture.conditioning), list(ran)
        found[f"{family} left gathered"] = left
        found[f"{family} velocity afterwards"] = answer(engine, batch.arguments)
        # Whoever gathered from the partition over all ranks, or from the other node, would see these.
        for parameter in parameters:
            parameter.ds_tensor.fill_(torch.nan)
            if rank >= RANKS_PER_NODE:
                parameter.ds_secondary_tensor.fill_(torch.nan)
        found[f"{family} poisoned"] = answer(engine, batch.arguments)
    torch.save(found, folder / f"rank{rank}.pt")
    launch.leave()
    launch.end()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Two launchers of two ranks each, as two nodes have them; what each rank found."""
    made = tmp_path_factory.mktemp("two nodes")
    for family in FAMILIES:
        torch.manual_seed(0)
        class_name, config = TEACHERS[family]
        getattr(diffusers, class_name)(**config).save_pretrained(made / family, max_shard_size="100KB")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = fresh("torch.distributed.run", f"--nnodes={NODES}", f"--nproc-per-node={RANKS_PER_NODE}")
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=two"]
    nodes = [
        subprocess.Popen(
            [*launcher, *meeting, "-m", "tests.teacher.test_two_nodes", str(made)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment(),
        )
        for _ in range(NODES)
    ]
    printed = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)
    ranks = [torch.load(made / f"rank{rank}.pt", weights_only=False) for rank in range(NODES * RANKS_PER_NODE)]
    return made, ranks


def stock_model(made: Path, family: str) -> nn.Module:
    return getattr(diffusers, TEACHERS[family][0]).from_pretrained(made / family).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_computes_what_the_stock_model_does(found: tuple[Path, list[dict[str, Any]]], family: str) -> None:
    made, ranks = found
    model = stock_model(made, family)
    for rank, own in enumerate(ranks):
        expected = answer(model, batch_of(family, rank).arguments)
        for run in ("with small parameters whole", "velocity", "velocity afterwards"):
            assert torch.equal(own[f"{family} {run}"], expected), run


@pytest.mark.parametrize("family", FAMILIES)
def test_gathers_stay_inside_a_node(found: tuple[Path, list[dict[str, Any]]], family: str) -> None:
    made, ranks = found
    sizes = [parameter.numel() for parameter in stock_model(made, family).parameters()]
    for rank, own in enumerate(ranks):
        assert own[f"{family} held"] == sum(-(-size // 4) * 2 for size in sizes)  # padded to the four ranks
        if rank < RANKS_PER_NODE:
            assert torch.equal(own[f"{family} poisoned"], own[f"{family} velocity"])
        else:
            assert not own[f"{family} poisoned"].isfinite().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_ends_behind_the_last_wanted_boundary(found: tuple[Path, list[dict[str, Any]]], family: str) -> None:
    made, ranks = found
    model, wanted = stock_model(made, family), WANTED[family]
    teacher = Teacher(made / family, run=call_once)
    for rank, own in enumerate(ranks):
        assert own[f"{family} ran"] == list(range(wanted.last + 1))
        whole: Capture = read_teacher(model, teacher, batch_of(family, rank))
        streams, conditioning = own[f"{family} capture"]
        blocks = teacher.blocks
        assert streams.keys() == {blocks[u].entering for u in wanted.calls} | {blocks[v].leaving for v in wanted.exits}
        assert conditioning.keys() == wanted.calls
        for boundary, tensors in streams.items():
            torch.testing.assert_close(tensors, whole.streams[boundary], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_stays_gathered_behind_a_forward(found: tuple[Path, list[dict[str, Any]]], family: str) -> None:
    for own in found[1]:
        assert own[f"{family} left gathered"] == [[]] * 4


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
