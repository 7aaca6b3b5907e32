"""Result files of the benchmarks' own scorers, as each of them writes them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import gmean

from ppcl_ds.errors import UserError, missing
from ppcl_ds.prompt_sets import PromptSet

Numbers = dict[str, float]
"""Name of a score -> its value in percent, the overall one first; HPSv2's and OneIG-Bench's are as they print them."""


def read_scores(given: str, sets: Sequence[PromptSet]) -> tuple[str, str, Numbers]:
    """One result file: set, model and what the scorer says.

    Args:
        given: `SET/MODEL=FILE`.

    Raises:
        UserError: there is no such set or file, or the file is none of its scorer's.
    """
    place, _, file = given.partition("=")
    name, _, model = place.partition("/")
    if not (name and model and file):
        raise UserError(f"--read-scores {given}: write it as SET/MODEL=FILE")
    known = {each.name: each for each in sets}
    if name not in known:
        raise UserError(f"--read-scores {given}: no set '{name}' in evaluate.sets; known: {', '.join(known) or 'none'}")
    layout = known[name].layout
    if layout not in _READERS:
        raise UserError(f"--read-scores {given}: layout '{layout}' has no scorer of its own")
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"--read-scores: {missing(path)}") from None
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"--read-scores: {path} cannot be read ({fault})") from None
    what, reader = _READERS[layout]
    try:
        found = reader(text, model)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError):
        found = {}
    if not found or not np.isfinite(list(found.values())).all():
        raise UserError(f"--read-scores: {path} is not what {layout}'s scorer writes ({what})")
    return name, model, found


def _rows(text: str) -> list[dict[str, Any]]:
    return [dict(json.loads(line)) for line in text.splitlines() if line.strip()]


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def _geneval(text: str, model: str) -> Numbers:
    tags: dict[str, list[float]] = {}
    for row in _rows(text):
        tags.setdefault(str(row["tag"]), []).append(float(row["correct"]))
    each = {tag: _percent(values) for tag, values in tags.items()}
    return {"overall": sum(each.values()) / len(each)} | each  # the mean of tasks, as `summary_scores.py` has it


def _dpg(text: str, model: str) -> Numbers:
    overall = re.findall(r"^DPG-Bench score: (\S+)$", text, re.M)
    level = text.partition("L1 category scores:")[2].partition("L2 category scores:")[0]
    return {"overall": float(overall[-1])} | {
        name: float(value) for name, value in re.findall(r"^\t(.+): (\S+)$", level, re.M)
    }


def _longtext(text: str, model: str) -> Numbers:
    if summary := re.search(r"^Text Score: (\S+)$", text, re.M):
        return {"text": 100 * float(summary[1])}
    rows = _rows(text)
    return {"text": 100 * sum(row["match_word_count"] for row in rows) / sum(row["gt_word_count"] for row in rows)}


def _oneig(text: str, model: str) -> Numbers:
    for row in csv.reader(io.StringIO(text)):
        if row and row[0] == "":
            names = row[1:]
        elif row and row[0] == model:
            return {name: float(value) for name, value in zip(names, row[1:], strict=True) if value}
    return {}


def _compbench(text: str, model: str) -> Numbers:
    if summary := re.fullmatch(r"\s*[\w -]+?score:\s*(\S+)\s*", text):
        return {"overall": 100 * float(summary[1])}
    return {"overall": _percent([float(row["answer"]) for row in json.loads(text)])}


def _hpsv2(text: str, model: str) -> Numbers:
    lines = re.findall(rf"^{re.escape(model)}\s+(\S+)\s+(\S+)\s+\S+$", text, re.M)
    each = {style: float(value) for style, value in lines}
    return {"overall": sum(each.values()) / len(each)} | each


def _geneval2(text: str, model: str) -> Numbers:
    lists = [[float(value) for value in each] for each in json.loads(text)]
    return {
        "soft_tifa_gm": 100 * float(np.mean([gmean(each) for each in lists])),
        "soft_tifa_am": 100 * float(np.mean([np.mean(each) for each in lists])),
    }


_READERS: Mapping[str, tuple[str, Callable[[str, str], Numbers]]] = {
    "geneval": ("results.jsonl of evaluate_images.py", _geneval),
    "dpg": ("the .txt of dist_eval.sh, with its last line", _dpg),
    "longtext": ("scores.txt or results.jsonl of summary_scores.py", _longtext),
    "oneig": ("a .csv of results/, with a row of the model", _oneig),
    "compbench": ("vqa_result.json or blip_vqa_score.txt", _compbench),
    "hpsv2": ("what hpsv2.evaluate prints, kept in a file", _hpsv2),
    "geneval2": ("the JSON lists of evaluation.py", _geneval2),
}
"""Layout -> which file, and what reads it."""
