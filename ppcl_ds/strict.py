"""What every section of a recipe is built on: known keys alone, possible numbers, paths as a shell reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

_LARGEST = 10**18
"""Numbers beyond it are slips of the finger."""


def expanded(path: str) -> str:
    """A path with `~` and `$NAME` as a shell would read them.

    Raises:
        ValueError: there is no such user or variable, nor such a file.
    """
    full = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"^~[\w-]*|\$(\w+|\{\w+\})", full)
    if unset and not Path(full).exists():
        raise ValueError(f"{unset[0]} is not set, so {path} is no path")
    return full


class Section(BaseModel):
    """Base of every recipe section: unknown keys are errors, values do not change after loading.

    In paths `~` and `$NAME` are what they are in a shell; relative ones are seen from where the command is run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_a_shell_reads_it(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and cls.model_fields[str(info.field_name)].annotation in (Path, Path | None):
            return expanded(value)
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"must be at most {_LARGEST:.0e}")
        return value
