"""Published teachers, all blocks, as ranks of 1, 2, 8 and 32 on the pretended accelerator; `make test-pretend`.

What `test_pretend.py` shows of a few blocks holds of all. The estimate is held against what the product's own trainers
were seen to take. A rank takes most of a minute, so of the stages the first and the last one run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.pretend.cases import Case
from tests.pretend.observe import estimated, observe, peaks
from tests.pretend.replay import replay

pytestmark = pytest.mark.pretend

QWEN = Case(blocks=0, stages=4, replicas=2, rounds=1, steps=2)
FLUX = replace(QWEN, family="flux")
WAN = replace(QWEN, family="wan", size=624, frames=81, micro_batch=1, units_at_most=4)
"""81 frames of 480p: as many pixels as 480 x 832 has, but square; a few units."""
ALONE = replace(QWEN, stages=1, replicas=1, offload=True, micro_batch=1)
CASES = {
    "qwen, 8": replace(QWEN, then=("look",)),
    "qwen, 8, fine-tuned": replace(QWEN, what="finetune"),
    "qwen, 8, whole": replace(QWEN, whole=True),
    "qwen, 1": replace(ALONE, units_at_most=10),
    "qwen, 1, teacher in CPU memory": replace(ALONE, units_at_most=8, teacher_offload=True),
    "qwen, 2": replace(ALONE, stages=2),
    "qwen, 32": replace(QWEN, replicas=8),
    "flux, 8": replace(FLUX, then=("look",)),
    "flux, 1": replace(ALONE, family="flux"),
    "flux, 2": replace(FLUX, stages=2, replicas=1, offload=True),
    "flux, 32": replace(FLUX, replicas=8),
    "wan, 8": WAN,
    "wan, 1": replace(WAN, stages=1, replicas=1, offload=True),
    "wan, 2": replace(WAN, stages=2, replicas=1),
    "wan, 32": replace(WAN, replicas=8),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_published_teacher_runs_as_the_estimate_says(case: Case) -> None:
    """Memory within 5 %; no devices mixed, no mask, the teacher gathered ahead, and waits for what has to be known."""
    memories = estimated(case)
    for number, rank in zip(case.ends, observe(case, case.ends), strict=True):
        for during, expected in peaks(memories[number // case.replicas]).items():
            assert rank.notes[during]["peak"] == pytest.approx(expected, rel=0.05)
        assert set(rank.notes["step"]["attention"]) == {"flash"}
        gathered = rank.notes["step"]["gathered"].keys() & {"ahead", "late"}
        assert bool(gathered) == (case.world > 1 and not case.whole)
        if gathered:
            assert rank.ahead() >= 0.95
        waits = rank.waits()
        assert waits["training/optimizer.py:step"] == 1
        assert {place.split("/")[0] for place in waits} <= {
            "training",
            "finetune",
            *(["teacher"] if case.teacher_offload else []),
        }


def test_every_kind_of_unit_runs_at_its_full_size() -> None:
    """The published plan of Qwen-Image, on the stage that has its last units."""
    case = replace(QWEN, plan="published")
    [rank] = observe(case, case.ends[-1:])
    assert rank.waits() == {"training/optimizer.py:step": 1}


@pytest.mark.parametrize("what", ["distill", "finetune"])
def test_eight_ranks_come_to_their_end_if_every_collective_blocks(what: Any) -> None:
    """On two nodes, each with a teacher of its own; what they ask of each other does not depend on the width."""
    narrow = replace(QWEN, heads=2, blocks=9, size=16, tokens=(12,), ranks_per_node=4)
    case = replace(narrow, what=what, zero=(("stage3_param_persistence_threshold", 0),))
    assert replay([rank.calls for rank in observe(case)]) > 0
