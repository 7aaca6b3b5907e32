"""What probing is said to need is what it needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ppcl_ds.data.batch import Size
from ppcl_ds.probing.costs import ProbingCosts, probing_costs
from ppcl_ds.probing.measure import measure
from ppcl_ds.probing.sums import BlockSums, Lane, zero_sums
from ppcl_ds.sections import Probe
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.meta_forward import meta_forward
from tests.conftest import QWEN_IMAGE

Configured = Callable[..., Teacher]
WORDS = 23
"""Text tokens of the usual caption that is counted with; of a picture there are 16."""


def costs(teacher: Teacher, room: int = 2**35, **probe: int) -> ProbingCosts:
    forward = meta_forward(teacher, Size(8, 8))
    section = Probe(**{"batch_size": 2, "batches": 3} | probe)
    return probing_costs(teacher.anatomy, forward.capture, forward.flops_until, 1, section, room)


def test_memory_and_arithmetic_are_those_of_the_program(configured: Configured) -> None:
    found = costs(configured("qwen"), max_span=4)
    lanes = [Lane("image", 0, 6, 32), Lane("text", 0, 6, 32)]
    sums = zero_sums(lanes, range(6), 4, torch.device("cpu"))
    assert found.passes == 1
    assert found.samples == 6
    assert found.sums == found.part == sum(t.nbytes for own in sums.values() for t in own.tensors().values())
    assert found.boundaries == 2 * 6 * (16 + WORDS) * 32 * 4  # samples, exits, tokens, channels, bytes of float32

    # A product of 2 N C^2 for each pair of exits in a window, whatever the half.
    numbers = {key: own.moments[0].numel() * (16 if key.stream == "image" else WORDS) for key, own in sums.items()}
    assert found.moment_flops == 6 * 2 * sum(numbers.values())
    with FlopCounterMode(display=False) as counter:
        measure(lanes, iter([sums]), 6, 1e-6, lambda block: True)
    # The counter sees products, not solutions; the estimate leaves out what is done with the sampled tokens.
    steps = [min(4, 6 - block) - 1 for block in range(6)]
    sampled = 2 * 2 * sum(steps) * 16 * 64 * 32 * (32 + 64) * 2
    assert counter.get_total_flops() - 2 * sampled < found.figure_flops < 2 * counter.get_total_flops()


def test_ranges_cost_passes_and_save_memory(configured: Configured) -> None:
    teacher = configured("flux")
    whole, ranged = costs(teacher), costs(teacher, blocks_at_once=3)
    assert (whole.passes, ranged.passes) == (1, 3)
    assert ranged.sums < 0.5 * whole.sums
    assert (ranged.part, ranged.moment_flops) == (whole.part, whole.moment_flops)
    assert whole.teacher_flops < ranged.teacher_flops < 3 * whole.teacher_flops


def test_qwen_image_is_summed_in_passes_that_fit(configured: Configured) -> None:
    teacher = configured("qwen", **QWEN_IMAGE)
    found = costs(teacher, batch_size=1, batches=2)
    assert found.passes == 5
    assert 2**34 < found.sums <= 2**35
    for room in (2**34, 2**36):
        other = costs(teacher, room, batch_size=1, batches=2)
        assert room / 2 < other.sums + other.boundaries <= room
    lane = Lane("image", 0, 60, 3072)
    moments = sum(torch.Size(BlockSums.shapes(lane, block, 8)["moments"]).numel() for block in range(60))
    assert found.part == pytest.approx(2 * 8 * moments, rel=0.05)  # two streams, float64; the samples are small


def test_every_number_is_said(configured: Configured) -> None:
    assert {field for field, value in vars(costs(configured("sd3"))).items() if not value} == set()
