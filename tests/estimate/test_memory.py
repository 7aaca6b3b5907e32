"""Bytes and traffic by part are those of sums written down by hand, on clusters that no test can have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ppcl_ds.distill.phases import Distilling, held, message
from ppcl_ds.estimate.activations import LiveBytes
from ppcl_ds.estimate.inputs import read_inputs
from ppcl_ds.estimate.measured import decoder_bytes, distilling, run_once
from ppcl_ds.estimate.numbers import Memory, add_up
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher import files
from ppcl_ds.training.phases import Sharding, partition_sizes
from ppcl_ds.training.traffic import Cluster, Traffic
from ppcl_ds.units.plan import Plan, UnitPlan
from tests.conftest import TEACHERS

SHARDING = Sharding(ranks_per_copy=8, max_live=10**9, prefetch=0, persistent=100)
BATCH, IMAGE, TEXT, WIDTH = 3, 16, 23, 32
"""8 x 8 pixels, and a caption of usual length."""
ALONE, TWO_STAGES, EIGHT = Cluster(1, 1, 1, 1), Cluster(1, 2, 2, 1), Cluster(1, 8, 2, 4)

Unprepared = Callable[..., Path]


def account_of(unprepared: Unprepared, **sections: Any) -> Distilling:
    """Units `a` and `b` of the tiny Qwen-Image, in bf16; nobody needs its last block."""
    sections = {"teacher": {"precision": "bf16"}, "distill": {"micro_batch": BATCH}} | sections
    recipe = load_recipe(unprepared("qwen", **sections))
    units = tuple(UnitPlan(name=n, span=s, streams=("image", "text")) for n, s in (("a", (0, 1)), ("b", (2, 4))))
    Plan(teacher=TEACHERS["qwen"][0], blocks=6, units=units, variants={}).save(recipe.plan_file)
    inputs = read_inputs(recipe, 1, 2)
    return sharded(distilling(inputs, run_once(inputs)))


def sharded(account: Distilling, **changes: Any) -> Distilling:
    return replace(account, teacher=replace(account.teacher, sharding=replace(SHARDING, **changes)))


@pytest.fixture
def account(unprepared: Unprepared) -> Distilling:
    return account_of(unprepared)


@pytest.fixture(scope="module")
def teacher() -> Any:
    class_name, config = TEACHERS["qwen"]
    return getattr(diffusers, class_name)(**config)


def memory(account: Distilling, cluster: Cluster, stage: int = 0) -> Memory:
    return add_up(account.phases(cluster)[stage])


def test_parameters_are_those_of_the_real_model(account: Distilling, teacher: Any) -> None:
    every, block = (sum(p.numel() for p in m.parameters()) for m in (teacher, teacher.transformer_blocks[0]))
    assert sum(elements for elements, _ in account.teacher.parameters) == every
    assert sum(elements for elements, _ in account.teacher.used) == every - block
    assert [unit.parameters for unit in account.layers] == [block, block]
    assert account.teacher.largest_block == block


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_a_partition_is_an_equal_share_of_every_parameter(ranks: int, teacher: Any) -> None:
    sizes = [(p.numel(), 2) for p in teacher.parameters()]
    assert sum(partition_sizes(sizes, ranks)) == sum(math.ceil(p.numel() / ranks) for p in teacher.parameters()) * 2


def test_families_keep_some_tensors_in_float32(unprepared: Unprepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.find_class(TEACHERS["qwen"][0]), "_keep_in_fp32_modules", ["norm_out"])
    parameters = account_of(unprepared).teacher.parameters
    assert sum(elements for elements, size in parameters if size == 4) == WIDTH * 2 * WIDTH + 2 * WIDTH


def test_one_process_holds_a_whole_teacher_and_gathers_nothing(account: Distilling) -> None:
    alone = memory(account, ALONE)
    assert alone.resident["teacher partition"] == sum(elements for elements, _ in account.teacher.parameters) * 2
    assert alone.resident["teacher copy in the node"] == alone.resident["teacher small tensors"] == 0
    assert alone.phases["teacher forward"]["gathered block"] == 0
    assert "exchange" not in alone.phases


def test_several_nodes_hold_a_second_copy_each(account: Distilling) -> None:
    one, four = (memory(account, cluster).resident for cluster in (EIGHT, Cluster(4, 8, 2, 16)))
    assert one["teacher copy in the node"] == 0
    assert four["teacher copy in the node"] == one["teacher partition"]
    assert four["teacher partition"] == sum(partition_sizes(account.teacher.parameters, 32))
    single = sharded(account, ranks_per_copy=32)
    assert memory(single, Cluster(4, 8, 2, 16)).resident["teacher copy in the node"] == 0


def test_a_whole_copy_on_every_rank_gathers_nothing(account: Distilling, teacher: Any) -> None:
    whole = sharded(account, ranks_per_copy=1, whole=True)
    found = memory(whole, EIGHT)
    own = {part: size for part, size in found.resident.items() if part.startswith("teacher")}
    assert own == {"teacher": sum(p.nbytes for p in teacher.parameters()) // teacher.dtype.itemsize * 2}
    assert found.phases["teacher forward"]["gathered block"] == 0
    assert whole.teacher.gathers(5, EIGHT) == Traffic()


def test_a_copy_in_every_node_keeps_gathers_off_the_network(account: Distilling) -> None:
    used = 2 * sum(elements for elements, _ in account.teacher.used if elements > SHARDING.persistent)
    cluster = Cluster(2, 4, 2, 4)
    assert sharded(account, ranks_per_copy=4).teacher.gathers(5, cluster) == Traffic(intra=used * 3 / 4)
    assert account.teacher.gathers(5, cluster).inter == used * 7 / 8 / 4


def test_small_parameters_stay_whole_on_every_rank(account: Distilling, teacher: Any) -> None:
    small = sum(p.numel() for p in teacher.parameters() if p.numel() <= SHARDING.persistent)
    assert memory(account, TWO_STAGES).resident["teacher small tensors"] == small * 2


def test_a_unit_costs_six_bytes_a_parameter_and_twelve_divided_over_the_replicas(account: Distilling) -> None:
    block = account.layers[0].parameters
    resident = memory(account, EIGHT).resident
    assert (resident["units"], resident["gradients"]) == (2 * block, 4 * block)
    assert resident["optimizer"] == 12 * math.ceil(block / 4)
    both = memory(account, Cluster(1, 8, 1, 8)).resident
    assert (both["units"], both["optimizer"]) == (4 * block, 12 * math.ceil(2 * block / 8))
    offload = account.settings.optimizer.model_copy(update={"offload": True})
    settings = account.settings.model_copy(update={"optimizer": offload})
    assert memory(replace(account, settings=settings), EIGHT).resident["optimizer"] == 0


@pytest.mark.parametrize("offload", [False, True])
def test_what_is_replayed_is_counted_where_it_lies(account: Distilling, offload: bool) -> None:
    """All micro-batches of the last readings, as much as this stage reads of them."""
    plain, replay = account.settings, {"uses": 4, "ring": 3, "offload": offload}
    settings = plain.model_copy(update={"replay": plain.replay.model_validate(replay), "micro_batches_per_step": 8})
    ringed = replace(account, settings=settings)
    own, ring = message([account.layers[0]]), memory(ringed, EIGHT)
    count = 3 * (held([account.layers[0]]) + own)  # one round of two stages
    assert ring.resident.get("replay", 0) == (0 if offload else count)
    assert ring.host.get("replay", 0) == (count if offload else 0)
    assert ring.phases["unit training"]["batches"] == (2 * own if offload else 0)
    shared, each = (account.phases(EIGHT)[0][0] for account in (ringed, replace(account, settings=plain)))
    assert shared.flops == each.flops / 4
    assert shared.moved == each.moved.times(1 / 4)


def test_a_checkpoint_is_a_copy_of_masters_and_moments(account: Distilling) -> None:
    share = math.ceil(account.layers[0].parameters / 4)
    assert memory(account, EIGHT).host == {"copies for a checkpoint": 12 * share}


def test_a_look_borrows_the_units_of_other_stages(account: Distilling) -> None:
    """Of the variant that has most of them; where nobody looks, nothing."""
    assert "look" not in memory(account, TWO_STAGES).phases
    settings = account.settings.model_copy(update={"sample_every": 10})
    looking = replace(account, settings=settings, variants=(("a",), ("a", "b")))
    teacher = memory(account, TWO_STAGES).phases["teacher forward"]
    for stage, other in enumerate(reversed(account.layers)):
        look = memory(looking, TWO_STAGES, stage).phases["look"]
        assert look["borrowed units"] == 2 * other.parameters
        assert look["activations"] == teacher["activations"]
        assert look["gathered block"] == teacher["gathered block"]
    assert memory(looking, ALONE).phases["look"]["borrowed units"] == 0


def test_a_look_loads_the_vae(unprepared: Unprepared) -> None:
    """As much as the VAE itself has when it decodes an image here, in float32 twice as much."""
    recipe = load_recipe(unprepared("flux", distill={"sample_every": 10}))
    inputs = read_inputs(recipe, 1, 2)
    vae = diffusers.AutoencoderKL.from_pretrained(recipe.teacher.path / "vae")
    latents = torch.zeros(1, *inputs.teacher.call.to_vae(inputs.size).shape)
    with LiveBytes("cpu") as live, torch.no_grad():
        vae.decode(latents)
    expected = sum(parameter.nbytes for parameter in vae.parameters()) + live.peak
    assert decoder_bytes(inputs.teacher, inputs.size) == pytest.approx(expected / 2, rel=0.1)


def test_replicas_average_gradients_and_gather_new_parameters(account: Distilling) -> None:
    *_, update = account.phases(EIGHT)[0]
    assert update.moved == Traffic(intra=account.layers[0].parameters * (2 * 4 + 2) * 3 / 4)


@pytest.mark.parametrize(
    ("prefetch", "max_live", "blocks"),
    [(0, 10**9, 2), (10**9, 10**9, None), (10**9, 0, 2)],
    ids=["nothing ahead", "all that there is", "none allowed"],
)
def test_what_is_gathered_ahead_is_bounded(
    account: Distilling, prefetch: int, max_live: int, blocks: int | None
) -> None:
    account = sharded(account, prefetch=prefetch, max_live=max_live)
    gathered = memory(account, TWO_STAGES).phases["teacher forward"]["gathered block"]
    used = sum(elements for elements, _ in account.teacher.used)
    assert gathered == 2 * (used if blocks is None else blocks * account.teacher.largest_block)


def test_each_tensor_travels_and_lies_in_memory_once(account: Distilling) -> None:
    def boundary(streams: int) -> int:
        return streams * BATCH * (IMAGE + TEXT) * WIDTH * 2

    # Time embedding, RoPE tables (8 complex numbers a token); captions of one length have no mask.
    conditioning = BATCH * WIDTH * 2 + (IMAGE + TEXT) * 8 * 8
    # Unit a reads boundary 0 and is judged by 2, where unit b begins; b is judged by 5.
    a, b = account.layers
    assert message([a]) == boundary(2) + conditioning
    assert message([a, b]) == boundary(3) + conditioning
    phases = memory(account, TWO_STAGES).phases
    assert phases["exchange"]["outgoing"] == phases["unit training"]["outgoing"] == message([b])
    assert phases["exchange"]["incoming"] == message([a])
    assert phases["unit training"]["batches"] == held([a]) + message([a])


def test_the_peak_is_what_is_always_there_and_the_worst_phase(account: Distilling) -> None:
    found = memory(account, TWO_STAGES, stage=1)
    worst = max(sum(parts.values()) for parts in found.phases.values())
    assert found.peak == sum(found.resident.values()) + worst
    assert sum(found.phases[found.worst].values()) == worst


@pytest.mark.parametrize("pinned", [False, True])
def test_a_teacher_in_cpu_memory_is_no_part_of_the_accelerators(account: Distilling, pinned: bool) -> None:
    """Pinned memory comes in powers of two; what is gathered, and what every rank has whole, is where it was."""
    cluster = Cluster(1, 2, 2, 1)
    here, there = (
        add_up(stage.phases(cluster)[0]) for stage in (account, sharded(account, offload=True, pinned=pinned))
    )
    gone = here.resident["teacher partition"]
    assert here.peak - there.peak == gone
    large = [size for size in account.teacher.parameters if size[0] > SHARDING.persistent]
    parts = partition_sizes(large, 2)
    assert there.host["teacher partition"] == sum(2 ** math.ceil(math.log2(n)) if pinned else n for n in parts)
    assert sum(parts) <= gone
    alone = sharded(account, offload=True).teacher.gathered(Cluster(1, 1, 1, 1))
    assert alone > 0, "a rank that is alone copies what it needs, too"
