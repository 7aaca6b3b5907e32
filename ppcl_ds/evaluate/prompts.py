"""Files of prompts as benchmarks publish them, read strictly: what a scorer would stumble over is one line here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppcl_ds.errors import UserError, missing, shown

_LONGEST = 8000
"""Characters of a prompt; the longest in any of the benchmarks has 1,475."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set.

    Attributes:
        number: of the prompt in its file, or in its folder's part of it, from 0.
        id: how the scorer calls it; with `folder`, nothing else in the set has it.
        place: where it stands, for a person.
        folder: the scorer's folder for its category; empty: there are none.
        entry: all that the file says of it, where that is JSON.
    """

    number: int
    id: str
    text: str
    place: str
    folder: str = ""
    entry: Mapping[str, Any] = field(default_factory=dict, compare=False)


def check(prompts: Sequence[Prompt], path: Path, unique_texts: bool) -> None:
    """Refuse what cannot be drawn or told apart.

    Raises:
        UserError: there are none; one is blank, too long or no text; two are the same.
    """
    if not prompts:
        raise UserError(f"{path}: no prompt in it")
    ids: dict[tuple[str, str], Prompt] = {}
    texts: dict[str, Prompt] = {}
    for prompt in prompts:
        if not prompt.text.strip():
            raise UserError(f"{prompt.place} is blank; every line is a prompt, delete it")
        if len(prompt.text) > _LONGEST:
            raise UserError(f"{prompt.place} has {len(prompt.text):,} characters; a prompt has at most {_LONGEST:,}")
        if "\0" in prompt.text:
            raise UserError(f"{prompt.place} has a NUL character; save it as UTF-8 text")
        if "/" in prompt.id or prompt.id.startswith("."):
            raise UserError(f"{prompt.place}: the id '{shown(prompt.id, 60)}' cannot be a file's name")
        if (same := ids.setdefault((prompt.folder, prompt.id), prompt)) is not prompt:
            raise UserError(f"{prompt.place} has the id '{shown(prompt.id, 60)}' of {same.place}; each needs its own")
        if unique_texts and (same := texts.setdefault(prompt.text, prompt)) is not prompt:
            raise UserError(f"{prompt.place} repeats {same.place}: '{shown(prompt.text, 60)}'; keep one of them")


def lines(path: Path) -> list[Prompt]:
    """A text file, a prompt a line; what follows a tab is left out, as T2I-CompBench has it."""
    found = enumerate(_lines(path))
    return [Prompt(n, f"{n:05d}", line.split("\t")[0].strip(), f"{path}, line {n + 1}") for n, line in found]


def json_lines(path: Path, key: str = "") -> list[Prompt]:
    """A JSON object a line, with `prompt`.

    Args:
        key: that names it, a whole number; empty: its line does.
    """
    prompts = []
    for number, line in enumerate(_lines(path)):
        place = f"{path}, line {number + 1}"
        if not line.strip():
            raise UserError(f"{place} is blank; delete it")
        entry = _json(line, place)
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UserError(f"{place}: no text under 'prompt'; give the benchmark's own file")
        name = entry.get(key, number) if key else number
        if not isinstance(name, int) or isinstance(name, bool) or name < 0:
            raise UserError(f"{place}: '{key}' is no whole number; give the benchmark's own file")
        prompts.append(Prompt(number, str(name), entry["prompt"], place, entry=entry))
    if key and prompts and not any(key in prompt.entry for prompt in prompts):
        raise UserError(f"{path}: its lines have no '{key}'; give the benchmark's own file")
    return prompts


def text_files(path: Path) -> list[Prompt]:
    """A folder of text files, a prompt each, whose names are ids."""
    files = _within(path, "*.txt")
    if dotted := next((file for file in files if "." in file.stem), None):
        raise UserError(f"{dotted}: a dot in its name, which the scorer cuts there; rename it")
    return [Prompt(n, file.stem, _text(file).strip(), str(file)) for n, file in enumerate(files)]


def styles(path: Path) -> list[Prompt]:
    """A folder of JSON lists, one a style, as `hpsv2` keeps them in `datasets/benchmark`."""
    named = ("anime", "concept-art", "paintings", "photo")
    files = [file for file in _within(path, "*.json") if file.stem in named]
    if not files:
        raise UserError(f"{path}: none of {', '.join(named)}.json in it; hpsv2 keeps them in its datasets/benchmark")
    prompts = []
    for file in files:
        listed = _json(_text(file), str(file))
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            raise UserError(f"{file}: no JSON list of prompts")
        prompts += [
            Prompt(n, f"{n:05d}", text, f"{file}, prompt {n}", folder=file.stem) for n, text in enumerate(listed)
        ]
    return prompts


_ONEIG = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}
"""OneIG-Bench's categories, and the folders that its scorers look into."""


def table(path: Path) -> list[Prompt]:
    """OneIG-Bench's CSV: `category`, `id`, and `prompt_en` or `prompt_cn`."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    columns = reader.fieldnames or []
    column = next((name for name in ("prompt_en", "prompt_cn") if name in columns), None)
    if column is None or not {"category", "id"} <= set(columns):
        raise UserError(f"{path}: no columns category, id and prompt_en or prompt_cn; give OneIG-Bench's own file")
    prompts = []
    for number, row in enumerate(reader):
        place = f"{path}, line {reader.line_num}"
        if row["category"] not in _ONEIG:
            raise UserError(f"{place}: no category '{shown(row['category'], 60)}'; known: {', '.join(_ONEIG)}")
        prompts.append(Prompt(number, row["id"] or "", row[column] or "", place, folder=_ONEIG[row["category"]]))
    return prompts


Reader = Callable[[Path], list[Prompt]]


def _within(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{shown(folder)}: a folder of prompts is needed" if folder.exists() else missing(folder))
    return sorted(folder.glob(pattern))


def _text(path: Path) -> str:
    """A UTF-8 file; a byte-order mark is no part of it."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(missing(path)) from None
    except OSError as fault:
        raise UserError(f"{shown(path)}: cannot be read ({fault.strerror})") from None
    except UnicodeDecodeError as fault:
        raise UserError(f"{shown(path)}: byte {fault.start} is not UTF-8; save it as UTF-8") from None


def _lines(path: Path) -> list[str]:
    """Lines as every scorer sees them; Unicode's own line separators end none."""
    text = _text(path).replace("\r\n", "\n")
    return text.removesuffix("\n").split("\n") if text else []


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as fault:
        raise UserError(f"{place}: no JSON ({fault})") from None
