"""Errors in one line: the one exception that is shown to a person so, and what other exceptions say."""

from __future__ import annotations

from pydantic import ValidationError


class UserError(Exception):
    """Something the user can put right: the message names the file, key or sample and says what to do.

    Commands print it as one line and exit with code 2.
    """


def brief(fault: BaseException) -> str:
    """What an exception says, on one line; of a pydantic one, the first thing that is wrong."""
    if isinstance(fault, ValidationError):
        first = fault.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return " ".join(str(fault).split()) or type(fault).__name__
