"""The loaded teacher: exactly the stock model, half of it on each of two ranks or whole on both; variants plug into it.

Run as a module, this file is one of the two ranks.
"""

from __future__ import annotations

import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppcl_ds import launch
from ppcl_ds.recipe import read_deepspeed_file
from ppcl_ds.shipped import shipped
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.depth import depth_unit
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.units.plugging import borrow, plugged
from ppcl_ds.units.variant import assembled
from tests.calls import answer, call_once, random_arguments
from tests.conftest import TEACHERS, WAN
from tests.ranks import run_ranks

RANKS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = TEACHERS | {
    "wan": WAN  # keeps a few of its tensors in float32 whatever it is loaded as
}
SPANS = {"qwen": [(0, 2), (4, 5)], "flux": [(1, 3), (5, 8)], "sd3": [(0, 1), (2, 4)]}


def plan_of(family: str) -> Plan:
    """Two units, one a rank."""
    units = tuple(UnitPlan(name=f"unit {i}", span=span, streams=("image",)) for i, span in enumerate(SPANS[family]))
    size = 9 if family == "flux" else 6
    return Plan(
        teacher=FAMILIES[family][0],
        blocks=size,
        units=units,
        variants={"both": ("unit 0", "unit 1"), "second": ("unit 1",)},
    )


@torch.no_grad()
def velocity(family: str, model: nn.Module, dtype: torch.dtype, seed: int) -> Tensor:
    if family == "wan":
        generator = torch.Generator().manual_seed(seed)
        embeds, latents = (torch.randn(2, *s, generator=generator).to(dtype) for s in ((5, 16), (4, 2, 4, 4)))
        return model(latents, torch.tensor([200, 700]), embeds, return_dict=False)[0]
    return answer(model, random_arguments(FAMILIES[family][0], seed, lengths=(5, 3), dtype=dtype))


def be_a_rank(folder: Path) -> None:
    """Load every teacher in every dtype, plug its variants, write down what came out."""
    launch.join()
    from ppcl_ds.teacher.sharded import load_teacher

    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    config = read_deepspeed_file(shipped("ds_configs/teacher_zero3.json"))
    # Tiny tensors are sharded too, as the large ones of real teachers are.
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    found: dict[str, Any] = {}
    for family in FAMILIES:
        teacher = Teacher(folder / family, run=partial(velocity, family, dtype=torch.float32, seed=0))
        for name, dtype in DTYPES.items():
            engine = load_teacher(teacher, config, dtype, None)
            parameters: list[Any] = list(engine.module.parameters())
            found[f"{family} {name} held"] = sum(p.ds_tensor.numel() for p in parameters)
            found[f"{family} {name} whole"] = sum(p.numel() for p in parameters)
            found[f"{family} {name} velocity"] = velocity(family, engine, dtype, seed=rank)
            found[f"{family} {name} dtypes"] = {key: p.dtype for key, p in engine.module.named_parameters()}
            whole = load_teacher(teacher, config, dtype, 1)
            found[f"{family} {name} whole velocity"] = velocity(family, whole, dtype, seed=rank)
            found[f"{family} {name} whole state"] = whole.module.state_dict()
            found[f"{family} {name} hooks"] = [m for m in whole.modules() if m._forward_pre_hooks or m._forward_hooks]
            if family in SPANS and name == "fp32":
                plan, anatomy = plan_of(family), teacher.anatomy
                units = {f"unit {rank}": depth_unit(teacher, SPANS[family][rank][0], dtype)}
                for how, model in {"": engine, "whole ": whole}.items():
                    for variant in plan.variants:
                        owner, wanted = {"unit 0": 0, "unit 1": 1}, plan.units_of(variant)
                        lent = borrow(wanted, units, owner, group, teacher, dtype, torch.device("cpu"))
                        with plugged(model.module, anatomy, plan, variant, lent):
                            found[f"{how}{family} {variant}"] = velocity(family, model, dtype, seed=7)
                    found[f"{how}{family} afterwards"] = velocity(family, model, dtype, seed=rank)
    torch.save(found, folder / f"rank{rank}.pt")
    launch.leave()
    launch.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers in many small safetensors files, and what two ranks found."""
    made = tmp_path_factory.mktemp("sharded")
    for family, (class_name, config) in FAMILIES.items():
        torch.manual_seed(0)
        getattr(diffusers, class_name)(**config).save_pretrained(made / family, max_shard_size="100KB")
        assert len(list((made / family).glob("*.safetensors"))) > 1
    run_ranks("tests.teacher.test_sharded", made, world=RANKS)
    return made


@lru_cache
def found(folder: Path, rank: int) -> dict[str, Any]:
    return torch.load(folder / f"rank{rank}.pt")


@lru_cache
def stock(folder: Path, family: str, dtype: torch.dtype) -> nn.Module:
    model_class = getattr(diffusers, FAMILIES[family][0])
    return model_class.from_pretrained(folder / family, torch_dtype=dtype).eval()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sharded_teacher_computes_exactly_what_the_stock_model_does(folder: Path, family: str, name: str) -> None:
    model = stock(folder, family, DTYPES[name])
    for rank in range(RANKS):
        expected = velocity(family, model, DTYPES[name], seed=rank)
        assert found(folder, rank)[f"{family} {name} velocity"].dtype == expected.dtype
        assert torch.equal(found(folder, rank)[f"{family} {name} velocity"], expected)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_the_stock_models_number_format(folder: Path, family: str, name: str) -> None:
    expected = {key: p.dtype for key, p in stock(folder, family, DTYPES[name]).named_parameters()}
    assert found(folder, 0)[f"{family} {name} dtypes"] == expected


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_of_two_ranks_holds_half_and_nothing_whole(folder: Path, family: str, name: str) -> None:
    sizes = [p.numel() for p in stock(folder, family, DTYPES[name]).parameters()]
    for rank in range(RANKS):
        assert found(folder, rank)[f"{family} {name} held"] == sum((size + 1) // 2 for size in sizes)
        assert found(folder, rank)[f"{family} {name} whole"] == 0


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_held_whole_it_is_the_stock_model_itself(folder: Path, family: str, name: str) -> None:
    """Every tensor in its dtype and nothing hung onto it; what it computes is what the divided one does."""
    model = stock(folder, family, DTYPES[name])
    for rank in range(RANKS):
        mine = found(folder, rank)
        assert torch.equal(mine[f"{family} {name} whole velocity"], mine[f"{family} {name} velocity"])
        assert not mine[f"{family} {name} hooks"]
        state = mine[f"{family} {name} whole state"]
        assert state.keys() == model.state_dict().keys()
        for key, tensor in model.state_dict().items():
            assert state[key].dtype == tensor.dtype
            assert torch.equal(state[key], tensor)


@pytest.mark.parametrize("variant", ["both", "second"])
@pytest.mark.parametrize("family", SPANS)
def test_a_plugged_variant_computes_what_the_assembled_model_does(folder: Path, family: str, variant: str) -> None:
    teacher = Teacher(folder / family, run=call_once)
    model = assembled(teacher, plan_of(family), variant, None)
    expected = velocity(family, model, torch.float32, seed=7)
    for rank in range(RANKS):
        mine = found(folder, rank)[f"{family} {variant}"]
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)
        assert torch.equal(found(folder, rank)[f"whole {family} {variant}"], mine)
    assert not torch.allclose(expected, velocity(family, stock(folder, family, torch.float32), torch.float32, seed=7))


@pytest.mark.parametrize("family", SPANS)
def test_unplugged_the_teacher_is_itself_again(folder: Path, family: str) -> None:
    for rank in range(RANKS):
        for how in ("", "whole "):
            assert torch.equal(
                found(folder, rank)[f"{how}{family} afterwards"], found(folder, rank)[f"{family} fp32 velocity"]
            )


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
