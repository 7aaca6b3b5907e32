"""Traffic goes over the links that ranks have between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ppcl_ds.estimate.accelerators import ACCELERATORS, Accelerator
from ppcl_ds.estimate.layout import Layout
from ppcl_ds.estimate.measured import Measured, measure
from ppcl_ds.estimate.settings import Settings
from ppcl_ds.estimate.speed import step_of
from ppcl_ds.estimate.traffic import Traffic, exchange, gathers, reduction, ring
from ppcl_ds.units.plan import Plan, UnitPlan
from tests.estimate.conftest import Configured

TWO_NODES = Layout(nodes=2, gpus_per_node=4, stages=2, replicas=4)
SETTINGS = Settings(ranks_per_copy=4, max_live=10**9, prefetch=0, persistent=100, offload=False)


@pytest.fixture
def run(configured: Configured) -> Measured:
    teacher = configured("qwen")
    units = tuple(UnitPlan(name=f"{u}", span=(u, u + 1), streams=("image",)) for u in (0, 2))
    plan = Plan(teacher="", blocks=6, units=units, variants={})
    options: dict[str, Any] = {"micro_batch": 2, "dtype": torch.bfloat16, "checkpointing": True}
    return measure(teacher, plan, (1, 8, 8), 5, **options)


def test_a_ring_stays_in_the_node_where_its_group_does() -> None:
    assert ring(80, 1, range(0, 4), TWO_NODES) == Traffic(intra=60)
    assert ring(80, 1, range(1, 8, 4), TWO_NODES) == Traffic(inter=40)
    assert ring(80, 1, range(0, 8), TWO_NODES) == Traffic(intra=70, inter=70 / 4)
    assert ring(80, 1, range(1, 2), TWO_NODES) == Traffic()


def test_a_copy_in_every_node_keeps_gathers_off_the_network(run: Measured) -> None:
    used = 2 * sum(elements for elements, _ in run.used if elements > 100)
    assert gathers(5, TWO_NODES, run, SETTINGS) == Traffic(intra=used * 3 / 4)
    alone = Settings(**vars(SETTINGS) | {"ranks_per_copy": 8})
    assert gathers(5, TWO_NODES, run, alone).inter == used * 7 / 8 / 4


def test_the_exchange_counts_the_fuller_direction_by_link() -> None:
    # Stages 0 and 1 lie on one node, stages 2 and 3 on the other.
    layout = Layout(nodes=2, gpus_per_node=2, stages=4, replicas=1)
    messages = [10, 20, 30, 40]
    assert exchange(0, messages, layout) == Traffic(intra=20, inter=70)  # receives 10, and 20
    assert exchange(3, messages, layout) == Traffic(intra=40, inter=80)  # sends 30, and 30
    assert exchange(0, [10], Layout(1, 2, 1, 2)) == Traffic()


def test_replicas_average_gradients_and_gather_new_parameters(run: Measured) -> None:
    block = run.unit_parameters["0"]
    moved = reduction(0, [["0"], ["2"]], TWO_NODES, run)
    assert moved == Traffic(intra=block * (2 * 4 + 2) * 3 / 4)


def test_both_kinds_of_link_work_at_once() -> None:
    slow = Accelerator(name="slow", memory_gib=1, tflops=1, tflops64=1, intra_gb=10, inter_gb=1)
    assert Traffic(intra=20e9, inter=1e9).seconds(slow) == 2
    assert Traffic(intra=20e9, inter=3e9).times(2).seconds(slow) == 6


@pytest.mark.parametrize("bound", ["compute", "links"])
def test_a_step_takes_the_slower_of_compute_and_traffic_in_each_phase(run: Measured, bound: str) -> None:
    fast, slow = 1e6, 1e-6
    rates = {"compute": (slow, fast, fast), "links": (fast, slow, slow)}[bound]
    machine = Accelerator(name="it", memory_gib=1, tflops=rates[0], tflops64=1, intra_gb=rates[1], inter_gb=rates[2])
    units = [["0"], ["2"]]
    step = step_of(units, TWO_NODES, run, SETTINGS, machine, micro_batches=16, checkpointing=True, utilisation=0.5)
    # Two rounds of micro-batches of two samples; a stage trains on a quarter of all sixteen micro-batches.
    assert step.teacher_flops == 2 * 2 * run.work.teacher
    assert step.unit_flops == 4 * 2 * 4 * run.work.units["0"]
    assert step.gathers == gathers(0, TWO_NODES, run, SETTINGS).times(2)
    messages = [run.message(names) for names in units]
    assert step.exchange == exchange(0, messages, TWO_NODES).times(2)
    if bound == "compute":
        expected = [flops / (slow * 1e12 * 0.5) for flops in (step.teacher_flops, step.unit_flops)]
    else:
        expected = [moved.seconds(machine) for moved in (step.gathers, step.exchange)]
    assert [step.teacher, step.units] == expected
    assert step.seconds == step.teacher + step.units + step.reduction.seconds(machine)


def test_every_accelerator_is_faster_inside_the_node_than_between_nodes() -> None:
    for name, accelerator in ACCELERATORS.items():
        assert accelerator.name == name
        assert accelerator.intra_gb > accelerator.inter_gb
        assert 0 < accelerator.usable_bytes < accelerator.memory_gib * 2**30
