"""What runs on an accelerator, checked without one: see `device.py` for what is pretended and `cases.py` for how large.

`test_published.py` takes the published sizes, all blocks.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.pretend.cases import Case
from tests.pretend.observe import estimated, estimated_peaks, observe, peaks, run_rank
from tests.pretend.replay import make_groups, replay

NARROW = Case(heads=2, blocks=4, size=16, tokens=(12,), rounds=1)


@pytest.mark.parametrize(
    "case",
    [
        replace(NARROW, then=("look", "save")),
        replace(NARROW, family="flux", blocks=2),
        replace(NARROW, plan="width", then=("look", "save")),
        replace(NARROW, uses=2, ring_offload=True, then=("save",)),
        replace(NARROW, what="finetune", boundary=1.0, ema=0.9, then=("look", "save")),
        replace(NARROW, what="finetune", blocks=6, offload=True, then=("save",)),
        replace(NARROW, what="finetune", family="flux", blocks=2),
        replace(NARROW, what="swaps", plan="width", stages=1, replicas=2),
        replace(NARROW, what="probe"),
        replace(NARROW, what="probe", whole=True, stages=1, replicas=2),
        replace(NARROW, what="swaps", whole=True, plan="width", stages=1, replicas=2),
        replace(NARROW, what="finetune", whole=True, boundary=1.0, then=("look", "save")),
        replace(NARROW, what="probe", teacher_offload=True),
    ],
    ids=lambda case: f"{case.what}-{case.family}-{case.plan}-{case.blocks}" + "-whole" * case.whole,
)
def test_no_operation_mixes_devices(case: Case) -> None:
    """Nothing is refused, on the first and the last stage; what is saved is a file."""
    for rank in observe(case, (0, case.world - 1)):
        if "save" in case.then:
            assert rank.notes["written"]
            assert rank.waits("save").keys() <= {"training/saver.py:run"}, "the writing thread alone"


@pytest.mark.parametrize(
    ("mistake", "place"),
    [("text", "teacher.py"), ("exchange", "exchange.py"), ("timestep", "teacher.py"), ("norms", "optimizer.py")],
)
def test_a_tensor_on_the_wrong_device_is_caught(mistake: str, place: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        case = replace(NARROW, blocks=8, mistake=mistake)
        case.write(Path(name) / "run")
        done = run_rank(case, Path(name) / "run")
    assert done.returncode == 1
    assert "MixedDevicesError" in done.stderr or mistake == "exchange", done.stderr
    assert place in done.stderr


STEP = Case(blocks=6)
"""At the published width; its captions are equally long, so nothing is padded."""
PADDED = replace(NARROW, tokens=(12, 9), micro_batch=4)


@pytest.mark.parametrize("case", [replace(NARROW, blocks=8), PADDED], ids=["small", "padded"])
def test_the_host_waits_for_the_device_once_a_step(case: Case) -> None:
    """For the norms, by which the step is clipped; losses, copies and logs wait for nothing."""
    for rank in observe(case, (0,)):
        assert rank.waits() == {"training/optimizer.py:step": 1}
        assert set(rank.notes["step"]["copies"]) == {"training/delivery.py:sent"}


@pytest.mark.parametrize("rounds", [1, 2])
def test_what_is_replayed_from_cpu_memory_is_not_waited_for(rounds: int) -> None:
    """Neither on its way there nor on its way back."""
    for rank in observe(replace(NARROW, blocks=8, rounds=rounds, uses=2, ring_offload=True), (0,)):
        assert rank.waits() == {"training/optimizer.py:step": 1}
        assert rank.notes["step"]["copies"].keys() == {"training/delivery.py:sent", "distill/replay.py:<lambda>"}


def test_an_optimizer_in_cpu_memory_is_waited_for_once_a_unit() -> None:
    """For its gradient, which is under way since it was averaged; not for the parameters on their way back."""
    [rank] = observe(replace(NARROW, blocks=8, offload=True), (0,))
    units = 2  # of four on eight blocks
    assert rank.waits() == {"training/optimizer.py:step": 1, "training/offload.py:gradient": units}
    assert rank.notes["step"]["copies"].keys() == {"training/delivery.py:sent", "training/offload.py:send"}


def test_the_pipeline_waits_for_what_it_is_told_alone() -> None:
    """A stage of 1F1B also learns how long its messages are; nothing else is waited for."""
    [rank] = observe(replace(NARROW, what="finetune", boundary=1.0), (0,))
    assert rank.notes["events kept"] == 0, "what is timed and never asked for is forgotten"
    assert set(rank.waits()) == {
        "training/optimizer.py:step",
        "training/optimizer.py:clip_norms",
        "finetune/pipeline.py:train_step",
    }


def test_the_teacher_is_gathered_ahead() -> None:
    """At least 95 % of the bytes are asked for before the block that needs them."""
    for rank in observe(STEP, (0, 1)):
        assert rank.ahead() >= 0.95


def test_a_teacher_held_whole_is_never_gathered() -> None:
    """Nor does a forward ask anything of the other ranks; it is looked at and drawn by, too."""
    case = replace(STEP, whole=True, then=("look",))
    for rank in observe(case, (0, case.world - 1)):
        for during in ("step", "look"):
            assert not rank.notes[during]["gathered"].keys() & {"ahead", "late"}
        assert rank.waits() == {"training/optimizer.py:step": 1}


def test_a_bucket_of_the_users_own_stays_as_it_is() -> None:
    [rank] = observe(replace(STEP, zero=(("stage3_prefetch_bucket_size", 50_000_000),)), (0,))
    assert rank.ahead() < 0.6


def test_what_has_to_be_there_altogether_is_sent_by_all_at_once() -> None:
    """Else one sender comes after the other, and what comes first is trained on meanwhile."""
    case = replace(NARROW, blocks=8, stages=3)
    for each, flights in ((case, 3), (replace(case, what="finetune"), 1), (replace(case, uses=2), 1)):
        for rank in observe(each, (0, 2)):
            assert rank.notes["exchange"] == {"flights": flights, "first": 1}


def test_looks_are_shared_over_the_ranks() -> None:
    """Eight samples, of which each rank of eight has one, and its prompt.

    Forwards for each model: one as in training, one for each branch, two for each of two steps; and of images two for
    each step.
    """
    case = replace(NARROW, blocks=8, stages=2, replicas=4, then=("look",))
    models, compared, drawn = 2, 1 + 2 + 2 * 2, 2 * 2  # guided, in two steps
    for rank in observe(case, (0, 7)):
        assert rank.notes["figures"]["samples"] == models * compared
        assert rank.notes["look"]["samples"] <= models * (1 + compared + drawn)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_teacher_in_cpu_memory_is_copied_ahead(stages: int) -> None:
    """No copy is waited for but by a rank that is alone, which waits once a block for the copies it was ahead with."""
    [rank] = observe(replace(STEP, teacher_offload=True, stages=stages), (0,))
    assert rank.ahead() >= (0.95 if stages > 1 else 0.9)
    blocks = rank.waits().pop("teacher/anatomy.py:_until_stopped", 0)
    assert blocks <= 4 * STEP.blocks * (stages == 1)
    assert {place for place in rank.waits() if "teacher/" not in place} == {"training/optimizer.py:step"}
    assert rank.notes["step"]["fetched"]["ahead"] > 2**30


def test_measuring_units_gathers_ahead() -> None:
    """Every forward but the first, which learns the order."""
    [rank] = observe(replace(NARROW, what="swaps", plan="width", stages=1, replicas=2), (0,))
    assert rank.ahead("products") >= 0.7
    assert rank.ahead("errors") >= 0.95


def test_attention_has_no_mask_where_nothing_is_padded() -> None:
    rank, _ = observe(STEP, (0, 1))
    assert set(rank.notes["step"]["attention"]) == {"flash"}


def test_attention_has_a_mask_where_captions_differ_in_length() -> None:
    [rank] = observe(PADDED, (0,))
    assert rank.notes["step"]["attention"]["masked"] > 0


@pytest.mark.parametrize(
    "case",
    [
        STEP,
        replace(STEP, uses=2),
        replace(STEP, uses=2, ring_offload=True),
        replace(STEP, whole=True),
        replace(STEP, teacher_offload=True),
        replace(STEP, teacher_offload=True, stages=1),
        replace(STEP, offload=True),
    ],
    ids=[
        "small",
        "replay",
        "replay-offload",
        "whole",
        "teacher-offload",
        "alone",
        "offload",
    ],
)
def test_peak_memory_is_that_of_the_estimate(case: Case) -> None:
    """Of every stage, within 5 %."""
    ranks = tuple(range(0, case.world, case.replicas))
    for rank, expected in zip(observe(case, ranks), estimated_peaks(case), strict=True):
        assert rank.notes["step"]["peak"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("case", [replace(STEP, then=("look",)), replace(STEP, whole=True, then=("look",))])
def test_a_look_takes_what_the_estimate_says(case: Case) -> None:
    """Units of the other stage are borrowed; within 5 %, but for the VAE."""
    for rank, memory in zip(observe(case, (0, 1)), estimated(case), strict=True):
        assert rank.notes["look"]["peak"] == pytest.approx(peaks(memory)["look"], rel=0.05)


@pytest.mark.parametrize("gib", [12.0, 24.0])
def test_probing_fills_the_memory_that_is_there_and_no_more(gib: float) -> None:
    """Sums of 14 blocks of the published width take 12 GiB: on the smaller card, of one range after the other."""
    case = Case(what="probe", blocks=14, stages=1, replicas=8, gib=gib, at_once=0)
    [rank] = observe(case, (0,))
    assert rank.notes["probed"]["peak"] < gib * 2**30
    assert rank.notes["passes"] == (1 if gib == 24 else 3)
    assert rank.notes["probed"]["peak"] > gib / 2 * 2**30


ORDERED = replace(NARROW, stages=2, replicas=2, ranks_per_node=2, zero=(("stage3_param_persistence_threshold", 0),))
"""On two nodes, each with a teacher of its own (hpZ)."""


@pytest.mark.parametrize(
    "case",
    [
        ORDERED,
        replace(ORDERED, what="finetune"),
    ],
    ids=["distill", "finetune"],
)
def test_all_ranks_come_to_their_end_if_every_collective_blocks(case: Case) -> None:
    """They call the same ones, in orders that fit together, and agree on every size."""
    assert replay([rank.calls for rank in observe(case)]) > 0


@pytest.mark.parametrize("barrier", [False, True], ids=["", "with the init barrier"])
@pytest.mark.parametrize("case", [ORDERED, replace(ORDERED, what="finetune")], ids=["distill", "finetune"])
def test_making_groups_waits_for_nobody(case: Case, barrier: bool) -> None:
    """Nobody splits the default group for a group that is not theirs, so nothing depends on its coming out even."""
    assert make_groups([rank.groups for rank in observe(case)], barrier) == 0
