"""FLOPs are those of formulas written down by hand."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from ppcl_ds.data.batch import Size
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.flops import Work, measure_work
from ppcl_ds.units.plan import Plan, UnitPlan
from tests.conftest import QWEN_IMAGE

Configured = Callable[..., Teacher]

WIDTH = 32
"""Channels inside every tiny teacher."""
WORDS = 23
"""Text tokens of the usual caption, which Qwen-Image's tiny pipeline counts with; the others' captions are cut."""


def plan(*spans: tuple[int, int]) -> Plan:
    units = tuple(UnitPlan(name=f"{u}-{v}", span=(u, v), streams=("image",)) for u, v in spans)
    return Plan(teacher="", blocks=0, units=units, variants={})


def linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def attention(tokens: int, width: int) -> int:
    """Scores and their product with the values; the heads' widths add up to `width`."""
    return 2 * (2 * tokens * tokens * width)


def joint_block(image: int, text: int, width: int) -> int:
    """A block of two streams: modulation, queries, keys, values and output of each, joint attention, two FFNs."""
    both = image + text
    modulation = 2 * linear(1, width, 6 * width)
    ffn = linear(both, width, 4 * width) + linear(both, 4 * width, width)
    return modulation + 4 * linear(both, width, width) + attention(both, width) + ffn


def single_block(tokens: int, width: int) -> int:
    """FLUX's block of one stream: modulation, queries, keys, values, FFN, and one output for attention and FFN."""
    inside = linear(tokens, width, 3 * width) + linear(tokens, width, 4 * width)
    return linear(1, width, 3 * width) + inside + attention(tokens, width) + linear(tokens, 5 * width, width)


def time_embedding(width: int) -> int:
    return linear(1, 256, width) + linear(1, width, width)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (16, 2)])
def test_a_qwen_image_stack_costs_what_its_matrices_cost(configured: Configured, height: int, width: int) -> None:
    teacher = configured("qwen")
    image, text = height // 2 * (width // 2), WORDS
    work = measure_work(teacher, plan((0, 1), (2, 4)), Size(height, width))
    block = joint_block(image, text, WIDTH)
    entrance = linear(image, 4, WIDTH) + linear(text, 16, WIDTH) + time_embedding(WIDTH)
    assert work.units == {"0-1": block, "2-4": block}
    assert work.teacher == entrance + 5 * block  # block 5 is after the last span


def test_width_units_cost_what_their_matrices_cost(configured: Configured) -> None:
    teacher, image, text = configured("qwen"), 16, WORDS
    units = (
        UnitPlan(name="group", kind="text", span=(1, 3), streams=("text",)),
        UnitPlan(name="line", kind="ffn", span=(2, 2), streams=("image",)),
        UnitPlan(name="thin", kind="ffn", span=(0, 0), streams=("image", "text"), keep=0.25),
    )
    width = Plan(teacher="", blocks=6, units=units, variants={})
    work = measure_work(teacher, width, Size(8, 8))
    assert work.units == {
        "group": 3 * linear(text, WIDTH, WIDTH),
        "line": linear(image, WIDTH, WIDTH),
        "thin": linear(image + text, WIDTH, WIDTH) + linear(image + text, WIDTH, WIDTH),  # a quarter of 4 x 32 channels
    }
    entrance = linear(image, 4, WIDTH) + linear(text, 16, WIDTH) + time_embedding(WIDTH)
    assert work.teacher == entrance + 4 * joint_block(image, text, WIDTH)  # to the group's end


def test_both_block_lists_of_flux_cost_what_their_matrices_cost(configured: Configured) -> None:
    teacher = configured("flux")
    work = measure_work(teacher, plan((1, 2), (5, 7)), Size(8, 8))
    joint, single = joint_block(16, 4, WIDTH), single_block(20, WIDTH)
    pooled = linear(1, 8, WIDTH) + linear(1, WIDTH, WIDTH)
    entrance = linear(16, 4, WIDTH) + linear(4, 16, WIDTH) + time_embedding(WIDTH) + pooled
    assert work.units == {"1-2": joint, "5-7": single}
    assert work.teacher == entrance + 4 * joint + 4 * single


def test_sd3s_second_attention_costs_extra(configured: Configured) -> None:
    teacher = configured("sd3")
    work = measure_work(teacher, plan((0, 1), (2, 3)), Size(8, 8))
    plain = joint_block(16, 8 + 4, WIDTH)
    extra = linear(1, WIDTH, 3 * WIDTH) + 4 * linear(16, WIDTH, WIDTH) + attention(16, WIDTH)
    assert work.units == {"0-1": plain + extra, "2-3": plain}


def test_a_step_counts_the_backward_twice_and_recomputation_once() -> None:
    work = Work(teacher=100.0, units={"a": 10.0, "b": 20.0})
    assert work.per_step(4, checkpointing=False) == 4 * (100 + 3 * 30)
    assert work.per_step(4, checkpointing=True) == 4 * (100 + 4 * 30)
    assert work.per_step(4, checkpointing=False, uses=5) == 4 * (20 + 3 * 30)


def test_the_work_of_twenty_billion_parameters_is_counted_in_seconds(configured: Configured) -> None:
    teacher = configured("qwen", **QWEN_IMAGE)
    began = time.monotonic()
    work = measure_work(teacher, plan((57, 58)), Size(128, 128))
    assert time.monotonic() - began < 30  # about three seconds on one idle core
    assert work.units["57-58"] == joint_block(4096, WORDS, 3072)
    assert work.teacher == pytest.approx(59 * joint_block(4096, WORDS, 3072), rel=1e-3)


def test_a_sample_that_the_teacher_cannot_read_is_refused(configured: Configured) -> None:
    for family, size, words in (
        ("qwen", Size(7, 8), "have to be multiples of 2"),
        ("sd3", Size(64, 64), "pos_embed_max_size"),
    ):
        teacher = configured(family)
        with pytest.raises(UserError, match=words):
            measure_work(teacher, plan((2, 3)), size)
