"""Official scorers' result files, made as their scripts print them, and the numbers that these would say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.official import read_scores
from ppcl_ds.prompt_sets import PromptSet

LAYOUTS = ("geneval", "dpg", "longtext", "oneig", "compbench", "hpsv2", "geneval2", "folder")
SETS = [PromptSet(name=f"my-{layout}", prompts=Path("prompts"), layout=layout) for layout in LAYOUTS]  # type: ignore[arg-type]


def jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


DPG = """\
images/0.png, 1.0, 0.5, 1.0, 1.0, 0.875
Model: small
L1 category scores:
\tentity: 90.5
\tattribute: 80.25
L2 category scores:
\tentity - whole: 91.0
Image path: images
Save results to: images/dpg.txt
DPG-Bench score: 87.5
"""
HPSV2 = """\
-----------benchmark score ----------------
teacher         anime           30.00 \t 0.1000
small anime           28.50 \t 0.1000
small photo           27.50 \t 0.2000
"""
GENEVAL = [
    {"filename": "a", "tag": "colors", "prompt": "a", "correct": True},
    {"filename": "b", "tag": "colors", "prompt": "b", "correct": False},
    {"filename": "c", "tag": "counting", "prompt": "c", "correct": True},
    {"filename": "d", "tag": "counting", "prompt": "d", "correct": True},
    {"filename": "e", "tag": "counting", "prompt": "e", "correct": True},
    {"filename": "f", "tag": "counting", "prompt": "f", "correct": True},
]
LONGTEXT = [{"match_word_count": 9, "gt_word_count": 10}, {"match_word_count": 10, "gt_word_count": 30}]
COMPBENCH = [{"question_id": 0, "answer": "0.5000"}, {"question_id": 1, "answer": "0.2500"}]

FILES: list[tuple[str, str, dict[str, float]]] = [
    ("geneval", jsonl(GENEVAL), {"overall": 75.0, "colors": 50.0, "counting": 100.0}),
    ("dpg", DPG, {"overall": 87.5, "entity": 90.5, "attribute": 80.25}),
    ("longtext", jsonl(LONGTEXT), {"text": 47.5}),
    ("longtext", "Text Score: 0.9430\n", {"text": 94.3}),
    ("oneig", ",alignment\nteacher,0.9\nsmall,0.88\n", {"alignment": 0.88}),
    ("compbench", json.dumps(COMPBENCH), {"overall": 37.5}),
    ("compbench", "BLIP-VQA score:0.375", {"overall": 37.5}),
    ("hpsv2", HPSV2, {"overall": 28.0, "anime": 28.5, "photo": 27.5}),
    ("geneval2", json.dumps([[1.0, 0.25], [0.5]]), {"soft_tifa_gm": 50.0, "soft_tifa_am": 56.25}),
]


@pytest.mark.parametrize(("layout", "content", "expected"), FILES)
def test_a_result_file_says_what_its_script_printed(
    layout: str, content: str, expected: dict[str, float], tmp_path: Path
) -> None:
    path = tmp_path / "result=1.txt"
    path.write_text(content)
    name, model, found = read_scores(f"my-{layout}/small={path}", SETS)
    assert (name, model) == (f"my-{layout}", "small")
    assert found == pytest.approx(expected)
    assert next(iter(found)) == next(iter(expected))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "folder"])
@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "not this\nfile\n", '{"tag": 1}\n', "a,b\n1,2\n", "[[]]", '[["x"]]']
)
def test_another_file_is_one_line(layout: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=f"is not what {layout}'s scorer writes") as fault:
        read_scores(f"my-{layout}/small={path}", SETS)
    assert "\n" not in str(fault.value)


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    for given, words in (
        ("small=file", "write it as SET/MODEL=FILE"),
        ("x/small=file", "no set 'x' in evaluate.sets; known: my-geneval"),
        (f"my-dpg/small={tmp_path / 'nowhere'}", "no such file"),
        (f"my-dpg/small={tmp_path}", "cannot be read"),
        ("my-folder/small=file", "layout 'folder' has no scorer of its own"),
    ):
        with pytest.raises(UserError, match=words):
            read_scores(given, SETS)
