"""What is wrong with a recipe, as words: the key, its line in the file, what should stand there."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel

from ppcl_ds.errors import shown
from ppcl_ds.yaml_file import Place

_SHOULD_BE = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string": "text",
    "bool": "true or false",
    "path": "a path",
    "byte_size": "a size such as 500MB",
    "tuple": "a list",
    "dict": "keys and values",
    "model": "a section of keys and values",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
    "too_long": "a list of at most {max_length}",
}
"""What a value should be by the beginning of pydantic's type of error; the longest that fits counts."""


def explain(error: Any, lines: dict[Place, int], recipe: type[BaseModel], gone: Mapping[tuple[Any, ...], str]) -> str:
    """One pydantic error as words with its line, and the nearest known key for an unknown one.

    Args:
        lines: where each key stands in the file.
        recipe: what was to be read.
        gone: keys of earlier releases, and what answers them now.
    """
    place = error["loc"]
    key = ".".join(str(part) for part in place)
    while place and place not in lines:
        place = place[:-1]
    line = f" (line {lines[place]})" if place else ""
    kind = error["type"]
    if kind == "extra_forbidden" and error["loc"] in gone:
        return f"key '{key}'{line} is gone; delete it: {gone[error['loc']]}"
    if kind == "extra_forbidden":
        known = _known_keys(recipe, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        return f"unknown key '{shown(key, 100)}'{line}; {hint}"
    if kind == "missing":
        return f"key '{key}' is missing{line}"
    fits = max((name for name in _SHOULD_BE if kind.startswith(name)), key=len, default="")
    if not fits:
        message = shown(error["msg"].removeprefix("Value error, "), 600)
        return f"{key}: {message}{line}" if key else message
    found = "nothing" if error["input"] is None else repr(error["input"])
    quotes = "; put it in quotes" if fits == "string" and isinstance(error["input"], int | float) else ""
    should = _SHOULD_BE[fits].format(**error.get("ctx", {}))
    return f"{key} must be {should}, not {shown(found, 80)}{quotes}{line}"


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        if isinstance(part, int):  # an entry of a list
            continue
        annotation = model.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
