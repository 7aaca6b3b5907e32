"""What each command of a run was: when, how long, on what, by which versions; the run's page is dated by it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe, open_run, written_recipe

_FILE = "commands.jsonl"
_PACKAGES = ("ppcl-ds", "torch", "diffusers", "transformers", "deepspeed")
_BEGAN = time.monotonic()
"""Of this process, as good as: the command line imports this module before anything that takes time."""


class Command(BaseModel):
    """One command that ended well.

    Attributes:
        ended: ISO 8601, UTC.
        seconds: of its first process.
        device: what it ran on.
        revision: of the package's own checkout; empty where it is no checkout.
    """

    name: str
    ended: str
    seconds: float
    processes: int
    device: str
    versions: Mapping[str, str]
    revision: str = ""


class _Line(BaseModel):
    """A line of `commands.jsonl`: a command, and the recipe that it read."""

    command: Command
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What is written down of a run.

    Attributes:
        recipe: of the last command; empty: none is known.
    """

    commands: Sequence[Command] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)


def read_record(run: Path) -> Record:
    """What is written down of a run; lines that cannot be read count for nothing."""
    lines = []
    with suppress(OSError):
        for text in (run / _FILE).read_text(errors="replace").splitlines():
            with suppress(ValidationError):
                lines.append(_Line.model_validate_json(text))
    return Record([line.command for line in lines], lines[-1].recipe) if lines else Record()


def write_down(recipe: Recipe, name: str) -> None:
    """Add this process's command to what is written down. Several jobs may do so at once: a line is appended whole."""
    line = _Line(command=this_command(name), recipe=recipe.model_dump(mode="json"))
    recipe.run.mkdir(parents=True, exist_ok=True)
    with (recipe.run / _FILE).open("a") as file:
        file.write(line.model_dump_json() + "\n")


def this_command(name: str) -> Command:
    """What can be said of a command that ends here and now."""
    import torch

    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return Command(
        name=name,
        ended=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=time.monotonic() - _BEGAN,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        versions=_versions(),
        revision=_revision(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _revision() -> str:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def open_any(path: Path) -> Recipe:
    """A recipe file, or the recipe of a run folder, whatever it has so far.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    record = read_record(path)
    if path.is_dir() and record.recipe:
        try:
            return written_recipe(json.dumps(record.recipe).encode(), path)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path / _FILE}: its recipe cannot be read; give the recipe file") from None
    return open_run(path)
