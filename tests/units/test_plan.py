"""The plan file: it comes back as it was saved, lays out a variant's blocks, and every problem names the culprit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import Plan, UnitPlan, load_plan, replace_plan
from tests.conftest import TEACHERS, make_teacher
from tests.pipelines import OPTIONS

PLAN = Plan(
    teacher="FluxTransformer2DModel",
    blocks=9,
    units=(
        UnitPlan(name="early", span=(0, 2), streams=("image", "text")),
        UnitPlan(name="middle", span=(2, 3), streams=("image", "text")),
        UnitPlan(name="late", span=(5, 8), streams=("image",)),
    ),
    variants={"8B": ("late", "early"), "11B: fast": ("middle",), "all of it": ()},
)


Teachers = dict[str, Teacher]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    made = {}
    for family in TEACHERS:
        folder = tmp_path_factory.mktemp(family)
        make_teacher(family, folder)
        made[family] = Teacher(folder, options=OPTIONS[family])
    return made


def test_a_plan_comes_back_as_it_was_saved(teachers: Teachers, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "plan.yaml"
    PLAN.save(path)
    assert load_plan(path, teachers["flux"]) == PLAN


def test_a_saved_plan_is_made_to_be_edited(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.yaml")
    lines = (tmp_path / "plan.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert sum("span: [" in line for line in lines) == len(PLAN.units)  # a unit is one line
    assert max(map(len, lines)) <= 120


def test_a_plan_that_somebody_has_edited_is_not_overwritten_and_earlier_ones_are_kept(tmp_path: Path) -> None:
    path, others = tmp_path / "plan.yaml", PLAN.model_copy(update={"variants": {"small": ("early",)}})
    assert replace_plan(path, PLAN) is None
    assert replace_plan(path, PLAN) is None  # the same
    assert [replace_plan(path, plan) for plan in (others, PLAN)] == [tmp_path / f"plan-{n}.yaml" for n in (1, 2)]
    assert [(tmp_path / f"plan-{n}.yaml").read_text() for n in (1, 2)] == [PLAN.written, others.written]
    written = PLAN.written
    for edited in (
        written.replace("early", "first"),
        written + "# mine\n",
        written.partition("\n")[2],
        written.replace("\n", "\r\n"),
        "",
    ):
        path.write_bytes(edited.encode())
        with pytest.raises(UserError, match="has been edited, and is not overwritten"):
            replace_plan(path, others)
        assert path.read_bytes() == edited.encode()


@pytest.mark.parametrize("name", ["yes", "1", "null", "12B, fast", "größer", "a: b", "#1", "it's", 'a "b"'])
def test_variants_may_have_any_name(teachers: Teachers, tmp_path: Path, name: str) -> None:
    plan = PLAN.model_copy(update={"variants": {name: ("early",)}})
    plan.save(tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml", teachers["flux"]) == plan


@pytest.mark.parametrize("name", ["1", "null", "early, late", "a: b"])
def test_units_may_have_any_name(teachers: Teachers, tmp_path: Path, name: str) -> None:
    unit = PLAN.units[0].model_copy(update={"name": name})
    plan = PLAN.model_copy(update={"units": (unit,), "variants": {"small": (name,)}})
    plan.save(tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml", teachers["flux"]) == plan


def test_a_plan_without_units_comes_back_too(teachers: Teachers, tmp_path: Path) -> None:
    plan = PLAN.model_copy(update={"units": (), "variants": {"the teacher": ()}})
    plan.save(tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml", teachers["flux"]) == plan


def test_places_are_the_variants_blocks_in_order() -> None:
    early, middle, late = PLAN.units
    assert PLAN.places("8B") == [(0, early), (3, None), (4, None), (5, late)]
    assert PLAN.places("11B: fast") == [(0, None), (1, None), (2, middle), *[(b, None) for b in range(4, 9)]]
    assert PLAN.places("all of it") == [(block, None) for block in range(9)]
    assert PLAN.units_of("8B") == [early, late]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.data())
def test_every_block_is_placed_or_covered_exactly_once(runs: list[int], data: st.DataObject) -> None:
    spans, first = [], 0
    for run in runs:
        if run > 1:
            spans.append((first, first + run - 1))
        first += run
    units = tuple(UnitPlan(name=f"u{u}", span=(u, v), streams=("image",)) for u, v in spans)
    plugged = data.draw(st.permutations([unit.name for unit in units]))
    plan = Plan(teacher="T", blocks=first, units=units, variants={"v": tuple(plugged)})
    covered: list[int] = []
    for block, unit in plan.places("v"):
        u, v = unit.span if unit else (block, block)
        assert u == block
        covered += range(u, v + 1)
    assert covered == list(range(first))
    assert len(plan.places("v")) == len(runs)


def test_an_unknown_variant_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'9B'.*8B"):
        PLAN.units_of("9B")


def width(kind: str, span: list[int], streams: list[str]) -> dict[str, Any]:
    return {"units": [{"name": "it", "kind": kind, "span": span, "streams": streams}]}


COMPLAINTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "overlap": ({"variants": {"8B": ["early", "middle"]}}, ["8B", "early", "middle"]),
    "the same unit twice": ({"variants": {"8B": ["early", "early"]}}, ["8B", "early"]),
    "span across lists": ({"units": [{"name": "wide", "span": [3, 4], "streams": ["image"]}]}, ["wide", "[3, 4]"]),
    "span after the end": ({"units": [{"name": "far", "span": [7, 9], "streams": ["image"]}]}, ["far", "[7, 9]"]),
    "span before the start": ({"units": [{"name": "neg", "span": [-1, 2], "streams": ["image"]}]}, ["neg", "[-1, 2]"]),
    "span of one block": ({"units": [{"name": "lone", "span": [1, 1], "streams": ["image"]}]}, ["lone", "[1, 1]"]),
    "span backwards": ({"units": [{"name": "back", "span": [3, 1], "streams": ["image"]}]}, ["back", "[3, 1]"]),
    "span of three numbers": ({"units": [{"name": "odd", "span": [0, 1, 2], "streams": ["image"]}]}, ["span"]),
    "unknown unit": ({"variants": {"8B": ["early", "lost"]}}, ["8B", "lost"]),
    "unknown stream": ({"units": [{"name": "early", "span": [0, 2], "streams": ["audio"]}]}, ["returns only"]),
    "no stream": ({"units": [{"name": "deaf", "span": [0, 2], "streams": []}], "variants": {}}, ["streams"]),
    "a stream twice": ({"units": [{"name": "echo", "span": [0, 2], "streams": ["text", "text"]}]}, ["echo", "twice"]),
    "a variant called teacher": ({"variants": {"teacher": ["early"]}}, ["variant 'teacher'"]),
    "a variant called undistilled": ({"variants": {"8B-undistilled": ["early"]}}, ["8B-undistilled"]),
    "a variant that is a path": ({"variants": {"../8B": ["early"]}}, ["../8B", "folder"]),
    "duplicate names": (
        {
            "units": [
                {"name": "early", "span": [0, 2], "streams": ["image"]},
                {"name": "early", "span": [5, 8], "streams": ["image"]},
            ]
        },
        ["early"],
    ),
    "other teacher": ({"teacher": "SD3Transformer2DModel"}, ["SD3Transformer2DModel", "FluxTransformer2DModel"]),
    "other number of blocks": ({"blocks": 57}, ["57", "9"]),
    "unknown key": ({"variant": {}}, ["variant"]),
    "unknown key of a unit": (
        {"units": [{"name": "early", "span": [0, 2], "streams": ["image"], "width": 3}]},
        ["width"],
    ),
    "text of fused blocks": (width("text", [5, 6], ["text"]), ["block 5", "no text stream of its own"]),
    "text of one block": (width("text", [1, 1], ["text"]), ["[1, 1]", "two blocks"]),
    "text across lists": (width("text", [3, 4], ["text"]), ["[3, 4]", "one list"]),
    "text that stops in the middle": (width("text", [1, 3], []), ["block 4", "[text]"]),
    "feed-forward of a fused block": (width("ffn", [6, 6], ["image"]), ["block 6", "fused"]),
    "feed-forward of two blocks": (width("ffn", [1, 2], ["image"]), ["[1, 2]", "[1, 1]"]),
    "feed-forward of no stream": (width("ffn", [1, 1], []), ["streams", "block 1"]),
    "keep of a span": ({"units": [{"name": "it", "span": [1, 2], "streams": ["image"], "keep": 0.5}]}, ["keep", "ffn"]),
    "missing key": ({"units": [{"span": [0, 2], "streams": ["image"]}]}, ["name"]),
}


@pytest.mark.parametrize(("changes", "culprits"), COMPLAINTS.values(), ids=COMPLAINTS.keys())
def test_a_complaint_is_one_line_that_names_file_and_culprit(
    teachers: Teachers, tmp_path: Path, changes: dict[str, object], culprits: list[str]
) -> None:
    path = tmp_path / "my plan.yaml"
    plan = PLAN.model_copy(update={"variants": {"8B": ("late", "early")}})
    if "units" in changes:
        changes = {"variants": {}} | changes  # so that only the unit is wrong
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json") | changes))
    message = problem(path, teachers["flux"])
    assert all(culprit in message for culprit in culprits), message


@pytest.mark.parametrize("content", [None, "", "units: [", "- just\n- a list\n", "teacher: [\tx"])
def test_a_file_that_is_no_plan_is_named(teachers: Teachers, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "my plan.yaml"
    if content is not None:
        path.write_text(content)
    problem(path, teachers["flux"])


def problem(path: Path, teacher: Teacher) -> str:
    with pytest.raises(UserError) as refused:
        load_plan(path, teacher)
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message
    return message


DEEP = UnitPlan(name="deep", span=(1, 2), streams=("image", "text"))
GROUP = UnitPlan(name="group", kind="text", span=(0, 1), streams=("text",))
NEXT_GROUP = UnitPlan(name="next group", kind="text", span=(1, 3), streams=("text",))
IMAGE_FFN = UnitPlan(name="image ffn", kind="ffn", span=(1, 1), streams=("image",))
BOTH_FFNS = UnitPlan(name="both ffns", kind="ffn", span=(1, 1), streams=("image", "text"))


@pytest.mark.parametrize(
    ("together", "reasons"),
    [
        ((DEEP, IMAGE_FFN), ["'image ffn' needs block 1", "'deep' replaces"]),
        ((DEEP, GROUP), ["'group' needs block 1", "'deep' replaces"]),
        ((GROUP, NEXT_GROUP), ["'group' and 'next group'", "text of block 1"]),  # its first block's text is no real one
        ((GROUP, BOTH_FFNS), ["'group' and 'both ffns'", "text ffn of block 1"]),
        ((IMAGE_FFN, BOTH_FFNS), ["'image ffn' and 'both ffns'", "image ffn of block 1"]),
        ((GROUP, IMAGE_FFN), None),
        ((NEXT_GROUP, BOTH_FFNS), None),  # what the group reads comes before its first block's feed-forward
    ],
)
def test_units_that_need_the_same_thing_are_refused_with_the_reason(
    teachers: Teachers, tmp_path: Path, together: tuple[UnitPlan, ...], reasons: list[str] | None
) -> None:
    names = tuple(unit.name for unit in together)
    plan = PLAN.model_copy(update={"units": together, "variants": {"v": names}})
    path = tmp_path / "plan.yaml"
    plan.save(path)
    if reasons is None:
        assert load_plan(path, teachers["flux"]) == plan
        return
    message = problem(path, teachers["flux"])
    assert all(reason in message for reason in reasons), message


def test_behind_the_last_block_nobody_reads_the_text(teachers: Teachers, tmp_path: Path) -> None:
    group = UnitPlan(name="end", kind="text", span=(4, 5), streams=("text",))
    plan = Plan(teacher="QwenImageTransformer2DModel", blocks=6, units=(group,), variants={})
    plan.save(tmp_path / "plan.yaml")
    assert "nobody reads" in problem(tmp_path / "plan.yaml", teachers["qwen"])


def test_a_span_may_close_a_list_only_where_the_stock_class_can_build_it(teachers: Teachers, tmp_path: Path) -> None:
    # SD3's last block has no text output, so a copy of another block cannot stand there.
    closing = UnitPlan(name="closing", span=(3, 5), streams=("image",))
    plan = Plan(teacher="SD3Transformer2DModel", blocks=6, units=(closing,), variants={"v": ("closing",)})
    plan.save(tmp_path / "sd3.yaml")
    assert "closing" in problem(tmp_path / "sd3.yaml", teachers["sd3"])
    qwen = plan.model_copy(update={"teacher": "QwenImageTransformer2DModel"})
    qwen.save(tmp_path / "qwen.yaml")
    assert load_plan(tmp_path / "qwen.yaml", teachers["qwen"]) == qwen
