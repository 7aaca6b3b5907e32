"""Errors in one line: the one exception that is shown to a person so, and what other exceptions say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

_LONGEST = 4000
"""Characters of a message; each thing that it names has at most so many as `shown` leaves."""


class UserError(Exception):
    """Something the user can put right: the message names the file, key or sample and says what to do.

    Commands print it as one line and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_cut(message, _LONGEST))


def shown(thing: object, most: int = 300) -> str:
    """Anything as it can be printed on one line and stored: at most so long, what is no character escaped."""
    text = _cut(thing if isinstance(thing, str) else str(thing), most)
    return _cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), most)


def problem(name: object, why: object) -> str:
    """One line about one thing that cannot be used; the logs are made of these. An OSError says what it is in words."""
    if isinstance(why, OSError):
        why = f"cannot be read ({why.strerror or brief(why)})"
    return f"{shown(name)}: {shown(brief(why) if isinstance(why, BaseException) else why)}"


def missing(path: Path) -> str:
    """Says that nothing is at a path, and, of a relative one, from where it was looked for."""
    seen_from = "" if path.is_absolute() else f", seen from {Path.cwd()}"
    return f"{shown(path)}: no such file or folder{seen_from}"


def brief(fault: BaseException) -> str:
    """What an exception says, on one line of bounded length; of a pydantic one, the first thing that is wrong."""
    if isinstance(fault, ValidationError):
        return worded(fault.errors()[0])
    return shown(" ".join(_cut(str(fault), _LONGEST).split())) or type(fault).__name__


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


def worded(error: Any, where: str = "") -> str:
    """One pydantic error as plain words: the key, what should stand there, what does.

    Args:
        where: what to say of the place, such as ` (line 3)`.
    """
    key = shown(".".join(str(part) for part in error["loc"]), 100)
    kind = error["type"]
    if kind == "missing":
        return f"key '{key}' is missing{where}"
    if kind == "extra_forbidden":
        return f"unknown key '{key}'{where}"
    fits = max((name for name in _SHOULD_BE if kind.startswith(name)), key=len, default="")
    if not fits:
        message = shown(error["msg"].removeprefix("Value error, "), 600)
        return f"{key}: {message}{where}" if key else message
    found = "nothing" if error["input"] is None else repr(error["input"])
    quotes = "; put it in quotes" if fits == "string" and isinstance(error["input"], int | float) else ""
    should = _SHOULD_BE[fits].format(**error.get("ctx", {}))
    return f"{key or 'it'} must be {should}, not {shown(found, 80)}{quotes}{where}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 4 :]}"
