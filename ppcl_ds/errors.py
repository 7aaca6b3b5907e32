"""Errors in one line: the one exception that is shown to a person so, and what other exceptions say."""

from __future__ import annotations

from pathlib import Path

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
        first = fault.errors()[0]
        return shown(": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"]))))
    return shown(" ".join(_cut(str(fault), _LONGEST).split())) or type(fault).__name__


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 4 :]}"
