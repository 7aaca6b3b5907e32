"""Bytes by part are those of sums written down by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

from ppcl_ds.estimate.layout import Layout
from ppcl_ds.estimate.measured import Measured, measure
from ppcl_ds.estimate.memory import memory_of, partition_bytes
from ppcl_ds.estimate.settings import Settings
from ppcl_ds.units.plan import Plan, UnitPlan
from tests.conftest import TEACHERS
from tests.estimate.conftest import Configured

SETTINGS = Settings(ranks_per_copy=8, max_live=10**9, prefetch=0, persistent=100, offload=False)
UNITS = [["a"], ["b"]]
BATCH, IMAGE, TEXT, WIDTH = 3, 16, 5, 32


@pytest.fixture
def run(configured: Configured) -> Measured:
    teacher = configured("qwen")
    units = tuple(
        UnitPlan(name=name, span=span, streams=("image", "text")) for name, span in (("a", (0, 1)), ("b", (2, 4)))
    )
    plan = Plan(teacher="", blocks=6, units=units, variants={})
    anatomy = teacher.anatomy
    options: dict[str, Any] = {"micro_batch": BATCH, "dtype": torch.bfloat16, "checkpointing": False}
    return measure(teacher, plan, (1, 8, 8), TEXT, **options)


@pytest.fixture(scope="module")
def teacher() -> Any:
    class_name, config = TEACHERS["qwen"]
    return getattr(diffusers, class_name)(**config)


def test_parameters_are_those_of_the_real_model(run: Measured, teacher: Any) -> None:
    assert sum(elements for elements, _ in run.parameters) == sum(p.numel() for p in teacher.parameters())
    block = sum(p.numel() for p in teacher.transformer_blocks[0].parameters())
    assert run.unit_parameters == {"a": block, "b": block}
    assert run.largest_block == block
    assert sum(elements for elements, _ in run.used) == sum(p.numel() for p in teacher.parameters()) - block


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_a_partition_is_an_equal_share_of_every_parameter(ranks: int, teacher: Any) -> None:
    sizes = [(p.numel(), 2) for p in teacher.parameters()]
    expected = sum(math.ceil(p.numel() / ranks) for p in teacher.parameters()) * 2
    assert partition_bytes(sizes, ranks) == expected
    whole = sum(p.numel() for p in teacher.parameters()) * 2
    assert whole / ranks <= expected <= whole / ranks + 2 * len(sizes)


def test_families_keep_some_tensors_in_float32(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = configured("qwen")
    monkeypatch.setattr(files.model_class, "_keep_in_fp32_modules", ["norm_out"])
    units = (UnitPlan(name="a", span=(0, 1), streams=("image",)),)
    plan = Plan(teacher="", blocks=6, units=units, variants={})
    options: dict[str, Any] = {"micro_batch": 1, "dtype": torch.bfloat16, "checkpointing": False}
    run = measure(teacher, plan, (1, 8, 8), TEXT, **options)
    norm_out = WIDTH * 2 * WIDTH + 2 * WIDTH
    assert sum(elements for elements, size in run.parameters if size == 4) == norm_out


def test_one_process_holds_a_whole_teacher_and_gathers_nothing(run: Measured) -> None:
    memory = memory_of(0, [["a", "b"]], Layout(1, 1, 1, 1), run, SETTINGS)
    assert memory.resident["teacher partition"] == sum(elements for elements, _ in run.parameters) * 2
    assert memory.resident["teacher copy in the node"] == memory.resident["teacher small tensors"] == 0
    assert memory.moments["teacher forward"]["gathered block"] == 0
    assert "exchange" not in memory.moments


def test_several_nodes_hold_a_second_copy_each(run: Measured) -> None:
    one = memory_of(0, UNITS, Layout(1, 8, 2, 4), run, SETTINGS).resident
    four = memory_of(0, UNITS, Layout(4, 8, 2, 16), run, SETTINGS).resident
    assert one["teacher copy in the node"] == 0
    assert four["teacher copy in the node"] == one["teacher partition"] == partition_bytes(run.parameters, 8)
    assert four["teacher partition"] == partition_bytes(run.parameters, 32)
    single = replace(SETTINGS, ranks_per_copy=32)
    assert memory_of(0, UNITS, Layout(4, 8, 2, 16), run, single).resident["teacher copy in the node"] == 0


def test_small_parameters_stay_whole_on_every_rank(run: Measured, teacher: Any) -> None:
    small = sum(p.numel() for p in teacher.parameters() if p.numel() <= SETTINGS.persistent)
    assert memory_of(0, UNITS, Layout(1, 2, 2, 1), run, SETTINGS).resident["teacher small tensors"] == small * 2


def test_a_unit_costs_six_bytes_a_parameter_and_twelve_divided_over_the_replicas(run: Measured) -> None:
    block = run.unit_parameters["a"]
    resident = memory_of(0, UNITS, Layout(1, 8, 2, 4), run, SETTINGS).resident
    assert resident["units"] == 2 * block
    assert resident["gradients"] == 4 * block
    assert resident["optimizer"] == 12 * math.ceil(block / 4)
    both = memory_of(0, [["a", "b"]], Layout(1, 8, 1, 8), run, SETTINGS).resident
    assert (both["units"], both["optimizer"]) == (4 * block, 12 * math.ceil(2 * block / 8))
    offloaded = memory_of(0, UNITS, Layout(1, 8, 2, 4), run, replace(SETTINGS, offload=True)).resident
    assert offloaded["optimizer"] == 0


@pytest.mark.parametrize(
    ("prefetch", "max_live", "blocks"),
    [(0, 10**9, 2), (10**9, 10**9, None), (10**9, 0, 2)],
    ids=["nothing ahead", "all that there is", "none allowed"],
)
def test_what_is_gathered_ahead_is_bounded(run: Measured, prefetch: int, max_live: int, blocks: int | None) -> None:
    settings = replace(SETTINGS, prefetch=prefetch, max_live=max_live)
    gathered = memory_of(0, UNITS, Layout(1, 2, 2, 1), run, settings).moments["teacher forward"]["gathered block"]
    used = sum(elements for elements, _ in run.used)
    assert gathered == 2 * (used if blocks is None else blocks * run.largest_block)


def boundary(streams: int) -> int:
    """Bytes of image and text at `streams` boundaries."""
    return streams * BATCH * (IMAGE + TEXT) * WIDTH * 2


CONDITIONING = BATCH * WIDTH * 2 + BATCH * TEXT + (IMAGE + TEXT) * 8 * 8
"""Time embedding, text mask (of the block and of the batch: the same), RoPE tables (8 complex numbers a token)."""


def test_boundaries_and_messages_hold_each_tensor_once(run: Measured) -> None:
    # Unit a reads boundary 0 and is judged by 2, where unit b begins; b is judged by 5.
    assert run.message(["a"]) == boundary(2) + CONDITIONING
    assert run.message(["a", "b"]) == boundary(3) + CONDITIONING
    assert run.held(["a", "b"]) >= run.message(["a", "b"])


def test_a_round_brings_the_parcels_of_every_stages_micro_batch(run: Measured) -> None:
    moments = memory_of(0, UNITS, Layout(1, 2, 2, 1), run, SETTINGS).moments
    assert moments["exchange"]["outgoing"] == run.message(["b"])
    assert moments["exchange"]["incoming"] == run.message(["a"])
    assert moments["unit training"]["parcels"] == run.held(["a"]) + run.message(["a"])
    assert moments["unit training"]["outgoing"] == run.message(["b"])


def test_of_a_stages_units_one_at_a_time_has_activations(run: Measured) -> None:
    alone = memory_of(0, UNITS, Layout(1, 2, 2, 1), run, SETTINGS).moments["unit training"]["activations"]
    together = memory_of(0, [["a", "b"]], Layout(1, 2, 1, 2), run, SETTINGS).moments["unit training"]["activations"]
    assert alone == run.activations["a"]
    assert together == max(run.activations.values())


def test_the_peak_is_what_is_always_there_and_the_worst_moment(run: Measured) -> None:
    memory = memory_of(1, UNITS, Layout(1, 2, 2, 1), run, SETTINGS)
    worst = max(sum(parts.values()) for parts in memory.moments.values())
    assert memory.stage == 1
    assert memory.peak == sum(memory.resident.values()) + worst
    assert sum(memory.moments[memory.worst].values()) == worst
