"""What is wrong with a recipe, as words: the key, its line in the file, what should stand there."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel

from ppcl_ds.errors import shown, worded
from ppcl_ds.yaml_file import Place


def explain(
    error: Any, lines: Mapping[Place, str], recipe: type[BaseModel], gone: Mapping[tuple[Any, ...], str]
) -> str:
    """One pydantic error as words with its line, and the nearest known key for an unknown one.

    Args:
        lines: where each key stands, such as `line 3`.
        recipe: what was to be read.
        gone: keys of earlier releases, and what answers them now.
    """
    place = error["loc"]
    key = ".".join(str(part) for part in place)
    while place and place not in lines:
        place = place[:-1]
    line = f" ({lines[place]})" if place else ""
    kind = error["type"]
    if kind == "extra_forbidden" and error["loc"] in gone:
        return f"key '{key}'{line} is gone; delete it: {gone[error['loc']]}"
    if kind == "extra_forbidden":
        known = _known_keys(recipe, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        return f"unknown key '{shown(key, 100)}'{line}; {hint}"
    return worded(error, line)


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        if isinstance(part, int):  # an entry of a list
            continue
        annotation = model.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
