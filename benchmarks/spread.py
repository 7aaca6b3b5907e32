"""How far do the demo's figures lie apart? Three teachers, each of another seed, through the whole demo.

    python -m benchmarks.spread [--json FILE] [--quick]

Seed 0 is the demo's own. A seed changes the teacher's training, and with it the plan, the noise and every figure, so
this is also what a run on another machine may give, where rounding differs. Prints Markdown: mean and standard
deviation over the seeds. What a run has done is not done again; runs lie in `runs/spread-N`. Latencies are left out:
they tell of the machine and of what else it does. With `--quick` a few steps in `runs/spread-quick-N`, whose figures
say nothing of the demo.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import typer
import yaml

from benchmarks.table import JsonFile, Quick, Row, row
from benchmarks.testbeds import TITLES, ppcl
from ppcl_ds.atomic import atomic_write
from ppcl_ds.console import track
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.evaluate.report import read_report
from ppcl_ds.shipped import shipped

SEEDS = (0, 1, 2)
COLUMNS = {"accuracy": "%", "frechet": "-", "velocity_mse": "-", "sample_mse": "-"}
"""Figures of a model, and their units."""
FEW: dict[str, dict[str, Any]] = {
    "demo": {"steps": 20},
    "distill": {"steps": 6, "log_every": 2, "sample_every": 3, "checkpoint_every": 3, "micro_batch": 8},
    "finetune": {"steps": 4, "log_every": 2, "sample_every": 2, "checkpoint_every": 2, "micro_batch": 8},
    "probe": {"batch_size": 16, "batches": 2},
    "evaluate": {"samples": 32, "batch_size": 32, "steps": 4, "velocity_batches": 1},
}
"""What `--quick` does with each section of the recipe."""


def write_recipe(folder: Path, seed: int, quick: bool) -> Path:
    """The demo's recipe with a run folder and a seed of its own, beside that folder; returns its file."""
    run = folder / f"spread-{'quick-' * quick}{seed}"
    recipe = yaml.safe_load(shipped("recipes/digits.yaml").read_text()) | {"run": str(run), "seed": seed}
    for section, few in FEW.items() if quick else ():
        recipe[section] |= few
    path = run.with_suffix(".yaml")
    atomic_write(path, yaml.safe_dump(recipe, sort_keys=False))
    return path


def values(figures: Sequence[ModelFigures], column: str) -> list[float]:
    """One figure of every seed, in its unit."""
    return [getattr(each, column) * (100 if COLUMNS[column] == "%" else 1) for each in figures]


def rows_of(seeds: Sequence[Sequence[ModelFigures]]) -> list[Row]:
    """A row a model and figure: its mean over the seeds, and the teacher's.

    Args:
        seeds: the rows of each seed's `report.json`, the teacher first.
    """
    found = []
    for figures in zip(*seeds, strict=True):
        for column, unit in COLUMNS.items():
            own = values(figures, column)
            teacher = mean(values([rows[0] for rows in seeds], column))
            each = ", ".join(f"{value:.4g}" for value in own)
            note = f"standard deviation {stdev(own):.3g}; of the seeds {each}; the other is the teacher"
            name = f"{figures[0].name}: {TITLES[column]}"
            # The teacher does not differ from itself, so that no ratio to it can be told.
            found.append(
                row(name, mean(own), teacher, unit, note) if teacher else Row(name, mean(own), 0, 0, unit, note)
            )
    return found


def markdown(seeds: Sequence[Sequence[ModelFigures]]) -> str:
    """The README's table with deviations."""
    lines = [f"| model | {' | '.join(TITLES.values())} |", "|---" * (1 + len(TITLES)) + "|"]
    for figures in zip(*seeds, strict=True):
        cells = []
        for column, unit in COLUMNS.items():
            own, digits = values(figures, column), 1 if unit == "%" else 4 if column.endswith("mse") else 3
            cells.append(f"{mean(own):.{digits}f} ± {stdev(own):.{digits}f}{' %' if unit == '%' else ''}")
        lines.append(f"| {figures[0].name} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"Mean ± standard deviation of {len(seeds)} teachers (seeds {', '.join(map(str, SEEDS))})."]
    )


def main(json_file: JsonFile = None, quick: Quick = False, folder: Path = Path("runs")) -> None:
    """Three teachers through the whole demo: every figure's mean and deviation."""
    seeds = []
    for seed in track(SEEDS, "demos", len(SEEDS)):
        path = write_recipe(folder, seed, quick)
        ppcl("demo", path)
        seeds.append(read_report(path.with_suffix("") / "report.json").models)
    print(markdown(seeds))
    if json_file is not None:
        json_file.write_text(json.dumps([vars(each) for each in rows_of(seeds)], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
