"""Which rule finds the best variants? Every rule's library is trained with the same number of unit-steps.

    python -m benchmarks.quality [--json FILE] [--quick] [--testbed digits]

A unit-step is one optimizer step of one unit. A rule's library holds the spans of its variants at -33, -50 and -75 %; a
library of fewer units trains each of them for longer, so that all rules cost the same. `planned` spends a third of its
unit-steps on all rules' spans, is then planned anew from what these units cost, and spends the rest on those it keeps.
Needs the testbed's teacher (`make demo`, `make showcase`); what is already trained is not trained again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import get_args

import matplotlib
import typer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.table import JsonFile, Quick, row_of_pairs, show
from benchmarks.testbeds import (
    COLUMNS,
    SIZES,
    Judge,
    Testbed,
    cell,
    folder_of,
    judged,
    ppcl,
    train_planned,
    units_of,
    write_recipe,
)
from ppcl_ds.console import track
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.recipe import load_recipe
from ppcl_ds.sections import Rule

RULES = tuple(rule for rule in get_args(Rule) if rule != "given")
PLANNED = "planned"
PROCESSES = 2
"""Libraries that are trained at a time, each on one CPU thread."""

Results = dict[tuple[str, str], list[ModelFigures]]
"""Rule and size -> figures of each seed."""


def train_rule(run: Path, rule: str, seed: int, unit_steps: int, testbed: str = "digits") -> Path:
    """Plan by a rule and train its library; returns the recipe file."""
    path = write_recipe(run, seed, 1, testbed, rule=rule)
    ppcl("plan", path)
    steps = unit_steps // units_of(path)
    write_recipe(run, seed, steps, testbed, rule=rule)
    ppcl("distill", path)
    return path


def compare(folder: Path, seeds: int, unit_steps: int, testbed: str) -> tuple[Results, ModelFigures]:
    """Train and judge every rule with every seed; also the teacher's own figures."""
    jobs = [(rule, seed) for seed in range(seeds) for rule in (*RULES, PLANNED)]
    judge = Judge(load_recipe(write_recipe(folder / "teacher", 0, 1, testbed)))
    results: Results = {}

    def train(job: tuple[str, int]) -> Path:
        rule, seed = job
        run = folder / f"{rule}-{seed}"
        if (run / "figures.json").exists():
            return run / "recipe.yaml"
        if rule == PLANNED:
            options = {"rule": "error", "candidates": [r for r in RULES if r != "random"]}
            return train_planned(run, seed, unit_steps, testbed=testbed, **options)
        return train_rule(run, rule, seed, unit_steps, testbed)

    with ThreadPoolExecutor(PROCESSES) as pool:
        paths = zip(jobs, pool.map(train, jobs), strict=True)
        for (rule, _), path in track(paths, "train and judge libraries", len(jobs)):
            for size, figures in judged(path, judge).items():
                results.setdefault((rule, size), []).append(figures)
    return results, judge.teacher


def print_figures(results: Results, teacher: ModelFigures) -> None:
    """Mean and spread over seeds, a row each rule and size, as Markdown."""
    print("| size | rule | velocity MSE | Fréchet | accuracy | sample MSE |\n|---|---|---|---|---|---|")
    print(f"| | teacher | 0 | {teacher.frechet:.3f} | {teacher.accuracy:.3f} | 0 |")
    for size in SIZES:
        for rule in (*RULES, PLANNED):
            cells = [cell([getattr(each, column) for each in results[rule, size]]) for column in COLUMNS]
            print(f"| {size} | {rule} | {' | '.join(cells)} |")


def draw(results: Results, path: Path) -> None:
    """Velocity error and Fréchet distance of every rule and size: a dot a seed, a bar the mean."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    rules = (*RULES, PLANNED)
    for axis, column, title in zip(axes, COLUMNS, ("velocity MSE", "Fréchet distance"), strict=False):
        for place, rule in enumerate(rules):
            for group, size in enumerate(SIZES):
                x = group + (place - len(rules) / 2 + 0.5) * 0.13
                values = [getattr(each, column) for each in results[rule, size]]
                label = rule if group == 0 else None
                axis.bar(x, mean(values), 0.12, color=f"C{place}", alpha=0.6, label=label)
                axis.plot([x] * len(values), values, ".", color="black", ms=4)
        axis.set(title=title, yscale="log", xticks=range(len(SIZES)), xticklabels=list(SIZES))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(json_file: JsonFile = None, quick: Quick = False, testbed: Testbed = "digits") -> None:
    """Print every rule's figures, and the planned variant's velocity error over each rule's."""
    folder = folder_of("quality", testbed, quick)
    seeds, unit_steps = (1, 100) if quick else (3, 3600)
    results, teacher = compare(folder, seeds, unit_steps, testbed)
    print_figures(results, teacher)
    draw(results, folder / "quality.png")
    rows = []
    for size in SIZES:
        ours = [each.velocity_mse for each in results[PLANNED, size]]
        for rule in RULES:
            other = [each.velocity_mse for each in results[rule, size]]
            note = f"velocity MSE of the planned variant over rule {rule}'s, {unit_steps} unit-steps each"
            rows.append(row_of_pairs(f"{size}: planned / {rule}", ours, other, "MSE", note))
    show("What is planned from measured units, over each rule", rows, json_file)
    print(f"wrote {folder}/quality.png")


if __name__ == "__main__":
    typer.run(main)
