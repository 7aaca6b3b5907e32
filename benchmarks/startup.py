"""How long commands are silent, and how long they take that have little to do: before, at another revision, and now.

    python -m benchmarks.startup [--before REVISION_OR_FOLDER] [--run FOLDER] [--only TEXT] [--json FILE] [--quick]

A tiny teacher is probed, planned and distilled first. Then both take turns, in fresh interpreters; what would go on for
long is ended with its first line. The other revision is checked out into a temporary worktree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import yaml

from benchmarks.table import JsonFile, Quick, Row, row, show

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """A command line.

    Attributes:
        words: of `ppcl`; `R` stands for the recipe, `E` for one whose plan was edited and is wrong, `M` for one of more
            steps, `P` for the plan, `L` for a LoRA.
        whole: whether it is run to its end.
    """

    name: str
    words: str
    whole: bool = True


CASES = (
    Case("help", "--help"),
    Case("a recipe that is not there", "distill gone.yaml"),
    Case("plan --check, as written", "plan R --check"),
    Case("plan --check, edited wrongly", "plan E --check"),
    Case("consolidate, unknown variant", "consolidate R --variant smal"),
    Case("lora remap, unknown variant", "lora remap L --plan P --variant smal"),
    Case("distill, done before", "distill R"),
    Case("distill --dry-run", "distill R --dry-run"),
    Case("estimate", "estimate R"),
    Case("probe", "probe R", whole=False),
    Case("distill, to go on", "distill M", whole=False),
    Case("evaluate", "evaluate R", whole=False),
)


def timed(words: list[str], code: Path, whole: bool) -> tuple[float, float]:
    """Seconds to the first output of any kind, and to the end."""
    environment = os.environ | {"PYTHONPATH": str(code)}
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "ppcl_ds.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=code,
    ) as command:
        assert command.stdout is not None
        command.stdout.read(1)
        first = time.perf_counter() - began
        if not whole:
            command.terminate()
        command.stdout.read()
    return first, time.perf_counter() - began


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """The folder of a revision; a folder is taken as it is."""
    if Path(revision).is_dir():
        yield Path(revision).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", place, revision], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", place], check=True)


def make_run(folder: Path) -> dict[str, str]:
    """A tiny run that is distilled, unless it is there already; what the letters in `CASES` stand for."""
    if not (folder / "R.yaml").exists():
        _make(folder)
    places = {name: str(folder / f"{name}.yaml") for name in "REM"}
    return places | {"P": str(folder / "run" / "plan.yaml"), "L": str(folder / "lora.safetensors")}


def _make(folder: Path) -> None:
    from benchmarks.workload import Workload, prepare  # with torch, whose memory what is measured may need

    path = prepare(folder / "run", Workload(6, 128, side=8, micro_batch=2), {"small": [(1, 3)], "large": [(4, 5)]})
    said: dict[str, Any] = yaml.safe_load(path.read_text().replace("{run}", str(path.parent)))
    said["distill"]["steps"] = 2
    edited = folder / "edited"
    edited.mkdir()
    (edited / "plan.yaml").write_text((path.parent / "plan.yaml").read_text().replace("[4, 5]", "[4, 50]"))
    lora = folder / "lora.safetensors"
    lora.touch()
    recipes = {
        "R": said,
        "E": said | {"run": str(edited)},
        "M": said | {"distill": said["distill"] | {"steps": 3}},
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    for command in ("distill", "plan --check"):
        name, *options = command.split()
        words = [sys.executable, "-m", "ppcl_ds.cli", name, str(folder / "R.yaml"), *options]
        subprocess.run(words, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def measure(before: str, folder: Path, only: str, repeats: int) -> Iterator[Row]:
    """Rows of a command: to its first output, and to its end; `other` is the other revision."""
    with checked_out(before) as earlier:
        places = make_run(folder)
        for case in (case for case in CASES if only in case.name):
            words = [places.get(word, word) for word in case.words.split()]
            pairs = [[timed(words, code, case.whole) for code in (ROOT, earlier)] for _ in range(repeats)]
            for number, what in enumerate(("first output", "whole") if case.whole else ("first output",)):
                ours, other = (median(pair[side][number] for pair in pairs) for side in (0, 1))
                yield row(f"{case.name}: {what}", ours, other, "s", f"median of {repeats}")


def main(
    before: Annotated[str, typer.Option(metavar="REVISION_OR_FOLDER", help="What it is compared with.")] = "HEAD",
    run: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the tiny run is made, or is.")] = None,
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only commands whose name in the table has this.")] = "",
    json: JsonFile = None,
    quick: Quick = False,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(before, run or Path(folder), only, 1 if quick else 3))
    show("Starting up", rows, json)


if __name__ == "__main__":
    typer.run(main)
