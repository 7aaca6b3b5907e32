"""Which rule finds the best variants? Every rule's library is trained with the same number of unit-steps.

    python -m benchmarks.quality [--teachers 3] [--json FILE] [--quick] [--testbed digits]

A unit-step is one optimizer step of one unit. A rule's library holds the spans of its variants at -33, -50 and -75 %; a
library of fewer units trains each of them for longer, so that all rules cost the same. `planned` spends a sixth of its
unit-steps on all rules' spans, is then planned anew from what these units cost, and spends the rest on those it keeps;
`planned, velocity` likewise, but by one-step errors alone and without asking how many units there are to train. Needs
the testbed's teacher (`make demo`, `make showcase`), and for more teachers those of `benchmarks.spread`; what is
already trained is not trained again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, get_args

import matplotlib
import typer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.table import JsonFile, Quick, Row, row_of_pairs, show
from benchmarks.testbeds import (
    COLUMNS,
    SIZES,
    TITLES,
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
ALL = (*RULES, f"{PLANNED}, velocity", PLANNED)
SEEDS = 3
PROCESSES = 2
"""Libraries that are trained at a time, each on one CPU thread."""

FEW = {"prompts": 8}
"""What a quick planner draws with."""

PICTURES = ("frechet", "accuracy", "sample_mse")
"""Figures by which rules are ranked."""

Pair = tuple[int, int]
"""A teacher and the seed of a training."""

Results = dict[Pair, dict[tuple[str, str], ModelFigures]]
"""Pair -> rule and size -> figures."""


def train(folder: Path, rule: str, pair: Pair, unit_steps: int, testbed: str, quick: bool) -> Path:
    """Plan by a rule and train its library, unless that has been judged; returns the recipe file."""
    teacher, seed = pair
    run = folder / f"{rule.replace(', ', '-')}-{f'{teacher}.' if teacher else ''}{seed}"
    if (run / "figures.json").exists():
        return run / "recipe.yaml"
    options: dict[str, Any] = {"testbed": testbed, "teacher": teacher, **(FEW if quick else {})}
    if rule.startswith(PLANNED):
        options |= {"rule": "error", "candidates": [each for each in RULES if each != "random"]}
        options |= {"unit_steps": unit_steps} if rule == PLANNED else {"objective": "velocity"}
        return train_planned(run, seed, unit_steps, **options)
    path = write_recipe(run, seed, 1, rule=rule, **options)
    ppcl("plan", path)
    write_recipe(run, seed, unit_steps // units_of(path), rule=rule, **options)
    ppcl("distill", path)
    return path


def compare(
    folder: Path, pairs: list[Pair], unit_steps: int, testbed: str, quick: bool
) -> tuple[Results, dict[int, ModelFigures]]:
    """Train and judge every rule with every pair; also the teachers' own figures."""
    jobs = [(rule, pair) for pair in pairs for rule in ALL]

    @cache
    def judge(teacher: int) -> Judge:
        return Judge(load_recipe(write_recipe(folder / f"teacher-{teacher}", 0, 1, testbed, teacher)), quick)

    teachers = {teacher: judge(teacher).teacher for teacher in sorted({teacher for teacher, _ in pairs})}
    results: Results = {pair: {} for pair in pairs}
    with ThreadPoolExecutor(PROCESSES) as pool:
        paths = pool.map(lambda job: train(folder, job[0], job[1], unit_steps, testbed, quick), jobs)
        for (rule, pair), path in track(zip(jobs, paths, strict=True), "train and judge libraries", len(jobs)):
            for size, figures in judged(path, judge(pair[0])).items():
                results[pair][rule, size] = figures
    return results, teachers


def of(results: Results, pairs: list[Pair], rule: str, size: str, column: str) -> list[float]:
    """A figure of a rule at a size, of every pair."""
    return [float(getattr(results[pair][rule, size], column)) for pair in pairs]


def print_figures(results: Results, pairs: list[Pair], teachers: dict[int, ModelFigures]) -> None:
    """Mean and spread over the pairs, a row each rule and size, as Markdown."""
    print(f"| size | rule | {' | '.join(TITLES[column] for column in COLUMNS)} |\n|{'---|' * 6}")
    own = [teachers[teacher] for teacher in sorted({teacher for teacher, _ in pairs})]
    accuracy = cell([float(each.accuracy or 0) for each in own])
    print(f"| | teacher | 0 | {cell([float(each.frechet or 0) for each in own])} | {accuracy} | 0 |")
    for size in SIZES:
        for rule in ALL:
            cells = [cell(of(results, pairs, rule, size, column)) for column in COLUMNS]
            print(f"| {size} | {rule} | {' | '.join(cells)} |")


def apart(ours: list[float], other: list[float]) -> float:
    """How much more our mean is, in standard deviations of both."""
    spread = ((stdev(ours) ** 2 + stdev(other) ** 2) / 2) ** 0.5
    return (mean(ours) - mean(other)) / max(spread, 1e-12)


def print_verdicts(results: Results, pairs: list[Pair]) -> None:
    """Where `planned` stands among the rules, in standard deviations of both, as Markdown."""
    print("\n| size | figure | the best rule | planned is behind it by | planned is better than `ppcl` by |")
    print(f"|{'---|' * 5}")
    for size, column in product(SIZES, PICTURES):
        values = {rule: of(results, pairs, rule, size, column) for rule in ALL}
        sign = -1 if column == "accuracy" else 1
        best = min(values, key={rule: sign * mean(own) for rule, own in values.items()}.__getitem__)
        first, paper = (sign * apart(values[PLANNED], values[other]) for other in (best, "ppcl"))
        behind = PLANNED if best == PLANNED else f"{first:.1f} sd"
        print(f"| {size} | {TITLES[column]} | {best} | {behind} | {-paper:.1f} sd |")


def draw(results: Results, pairs: list[Pair], path: Path) -> None:
    """Fréchet distance and sample error of every rule and size: a dot a training, a bar the mean."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for axis, column in zip(axes, ("frechet", "sample_mse"), strict=True):
        for place, rule in enumerate(ALL):
            for group, size in enumerate(SIZES):
                x = group + (place - len(ALL) / 2 + 0.5) * 0.12
                values = of(results, pairs, rule, size, column)
                label = rule if group == 0 else None
                axis.bar(x, mean(values), 0.11, color=f"C{place}", alpha=0.6, label=label)
                axis.plot([x] * len(values), values, ".", color="black", ms=4)
        axis.set(title=TITLES[column], yscale="log", xticks=range(len(SIZES)), xticklabels=list(SIZES))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def rows_of(results: Results, pairs: list[Pair], unit_steps: int) -> list[Row]:
    """The planned variant's figures over each rule's."""
    rows = []
    for size, rule, column in product(SIZES, ALL[:-1], PICTURES):
        ours, other = (of(results, pairs, each, size, column) for each in (PLANNED, rule))
        note = f"{TITLES[column]} of the planned variant over {rule}'s, {unit_steps} unit-steps each"
        rows.append(row_of_pairs(f"{size}: planned / {rule}", ours, other, TITLES[column], note))
    return rows


def main(
    json_file: JsonFile = None,
    quick: Quick = False,
    testbed: Testbed = "digits",
    teachers: Annotated[int, typer.Option(help="With one training each, beside those of the first.")] = 1,
) -> None:
    """Print every rule's figures, and the planned variant's over each rule's."""
    folder = folder_of("quality", testbed, quick)
    seeds, unit_steps = (1, 200) if quick else (SEEDS, 4800)
    one = [(0, seed) for seed in range(seeds)]
    several = [(teacher, teacher) for teacher in range(teachers)]
    results, own = compare(folder, list(dict.fromkeys([*one, *several])), unit_steps, testbed, quick)
    for title, pairs in (("One teacher, seeds of training", one), ("A training of each teacher", several)):
        if len(pairs) > 1 or pairs is one:
            print(f"\n### {title}: {len(pairs)}\n")
            print_figures(results, pairs, own)
        if len(pairs) > 1:
            print_verdicts(results, pairs)
    draw(results, one, folder / "quality.png")
    show("What is planned from measured units, over each rule", rows_of(results, one, unit_steps), json_file)
    print(f"wrote {folder}/quality.png")


if __name__ == "__main__":
    typer.run(main)
