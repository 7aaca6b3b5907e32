"""What is each lever of the local phase worth alone? At -50 and -75 %, all with the same number of unit-steps.

    python -m benchmarks.ablations [--seeds N] [--json FILE] [--quick] [--testbed digits]

A unit-step is one optimizer step of one unit. Every library holds the units of one plan (rule `error`, both sizes) and
differs from the first one in one lever; a library of two rounds spends half of its unit-steps on spans of two, from
which its units then start. A second table has the training loss of single units by the length of their span, for every
start. Needs the testbed's teacher, shards and probe report (`make demo`); what is already trained is not trained again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Annotated, Any, get_args

import typer
import yaml

from benchmarks.table import JsonFile, Quick, Row, row_of_pairs, show
from benchmarks.testbeds import TITLES, Judge, Library, cell, ppcl, units_of, write_recipe
from ppcl_ds.console import track
from ppcl_ds.recipe import load_recipe
from ppcl_ds.sections import Distill
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.units.plan import Plan
from ppcl_ds.units.spec import UnitPlan
from ppcl_ds.watch.tensorboard import read_scalars

SIZES = {"-50 %": 0.5, "-75 %": 0.75}
PAIRS = {"variants": {"pairs": 0.5}, "max_span": 2}
"""What is planned for the first of two rounds."""

LENGTHS = (2, 3, 4, 6)
"""Blocks of the spans of the second table; two spans each."""

STARTS: tuple[str, ...] = get_args(Distill.model_fields["start"].annotation)
PROCESSES = 2
"""Libraries that are trained at a time, each on one CPU thread."""

Figures = dict[str, float]
"""Column of the table -> value."""


@dataclass(frozen=True)
class Lever:
    """What is done otherwise.

    Attributes:
        distill, noise: changes of the recipe's sections.
        rounds: of distillation.
    """

    name: str
    distill: dict[str, Any] = field(default_factory=dict)
    noise: dict[str, Any] = field(default_factory=dict)
    rounds: int = 1

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() or letter == "." else "_" for letter in self.name)


BASE = Lever("start first, dropout 0.1", {"start": "first"})
LEVERS = (
    BASE,
    *(Lever(f"start {how}", {"start": how}) for how in STARTS if how != "first"),
    Lever("two rounds, start first", {"start": "first"}, rounds=2),
    Lever("two rounds, start mean", {"start": "mean"}, rounds=2),
    *(Lever(f"dropout {share:g}", BASE.distill, {"caption_dropout": share}) for share in (0.0, 0.5)),
    Lever("noisy levels weigh double", BASE.distill | {"level_weights": {0.0: 2.0, 1.0: 1.0}}),
    Lever("clean levels weigh double", BASE.distill | {"level_weights": {0.0: 1.0, 1.0: 2.0}}),
    *(Lever(f"branch loss {weight:g}", BASE.distill | {"branch_weight": weight}) for weight in (0.1, 1.0)),
)


class Bed:
    """A testbed: its plans, made once, and how models are judged on it.

    Args:
        folder: where everything is trained.
        name: of the recipe that made the teacher.
        quick: judges few images.
    """

    def __init__(self, folder: Path, name: str, quick: bool = False) -> None:
        self.folder, self.name = folder, name
        self.first_round = Lock()  # several levers share it
        self.plan = self._planned("plan", variants=SIZES)
        self.pairs = self._planned("pairs", **PAIRS)
        self.lengths = self._lengths()
        self.judge = Judge(load_recipe(self.plan), quick)

    def _planned(self, name: str, **options: Any) -> Path:
        path = write_recipe(self.folder / name, 0, 1, self.name, **options)
        if not load_recipe(path).plan_file.exists():
            ppcl("plan", path)
        return path

    def _lengths(self) -> Path:
        """A plan of single spans: of each length one early and one late, and none with the last block."""
        path = write_recipe(self.folder / "lengths", 0, 1, self.name)
        teacher = open_teacher(load_recipe(path))
        blocks = len(teacher.blocks)
        spans = [(first, first + n - 1) for n in LENGTHS for first in (1, blocks - 1 - n) if first + n < blocks]
        units = [
            UnitPlan(name=f"blocks_{u:02}_{v:02}", span=(u, v), streams=tuple(teacher.blocks[v].returns))
            for u, v in dict.fromkeys(spans)
            if (u, v) in teacher.allowed_spans
        ]
        plan = Plan(teacher=teacher.class_name, blocks=blocks, units=tuple(units), variants={})
        plan.save(load_recipe(path).plan_file)
        return path

    def train(self, run: Path, plan: Path, seed: int, unit_steps: int, lever: Lever) -> Path:
        """Train the library of a plan, unless that has been done; returns its recipe."""
        path = run / "recipe.yaml"
        if (run / "trained").exists():
            return path
        path = write_recipe(run, seed, max(2, unit_steps // units_of(plan)), self.name, variants=SIZES)
        recipe = yaml.safe_load(path.read_text())
        recipe["distill"] |= lever.distill
        recipe["noise"] |= lever.noise
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        shutil.copy(load_recipe(plan).plan_file, run / "plan.yaml")
        ppcl("distill", path)
        (run / "trained").touch()
        return path

    def pull(self, unit_steps: int, lever: Lever, seed: int) -> Path:
        """Train what a lever makes of the plan; returns its recipe."""
        run = self.folder / f"{lever.folder}-{seed}"
        share = unit_steps // lever.rounds
        if lever.rounds == 1:
            return self.train(run, self.plan, seed, share, lever)
        first = self.folder / f"pairs-{seed}"
        with self.first_round:
            self.train(first, self.pairs, seed, share, BASE)
        distill = lever.distill | {"start_from": str(first)}
        return self.train(run, self.plan, seed, share, Lever(lever.name, distill, lever.noise))

    def judged(self, path: Path) -> dict[str, Figures]:
        """Figures of every size, from the run folder if they were taken before."""
        file = path.with_name("figures.json")
        if not file.exists():
            library = Library(path)
            found = {size: self.figures(library.model(names).eval()) for size, names in library.plan.variants.items()}
            file.write_text(json.dumps(found, indent=1))
        return dict(json.loads(file.read_text()))

    def figures(self, model: Any) -> Figures:
        """All columns of the table for a model."""
        figures = self.judge.of(model)
        return {column: getattr(figures, column) for column in TITLES}

    def by_length(self, unit_steps: int, how: str, seed: int) -> dict[int, float]:
        """Length of a span -> mean loss of its units over the last steps, all streams."""
        lever = Lever(f"lengths {how}", {"start": how})
        path = self.train(self.folder / f"{lever.folder}-{seed}", self.lengths, seed, unit_steps, lever)
        recipe = load_recipe(path)
        scalars = read_scalars(recipe.distillation.board)
        found: dict[int, list[float]] = {}
        for unit in yaml.safe_load(recipe.plan_file.read_text())["units"]:
            loss = sum(scalars[f"{unit['name']}/loss/{stream}"][-1][1] for stream in unit["streams"])
            found.setdefault(unit["span"][1] - unit["span"][0] + 1, []).append(loss)
        return {length: mean(losses) for length, losses in found.items()}


def print_figures(found: dict[str, list[dict[str, Figures]]], levers: Sequence[Lever]) -> None:
    """Mean and spread over seeds, a row each size and lever, as Markdown."""
    print(f"| size | lever | {' | '.join(TITLES.values())} |\n|{'---|' * (len(TITLES) + 2)}")
    for size in SIZES:
        for lever in levers:
            cells = [cell([each[size][column] for each in found[lever.name]]) for column in TITLES]
            print(f"| {size} | {lever.name} | {' | '.join(cells)} |")


def print_lengths(found: dict[str, list[dict[int, float]]]) -> None:
    """The loss of a unit by start and length of its span, as Markdown."""
    lengths = sorted({length for each in found.values() for length in each[0]})
    print(f"\n| loss of a unit, by start | {' | '.join(f'{n} blocks' for n in lengths)} |")
    print(f"|{'---|' * (len(lengths) + 1)}")
    for how, seeds in found.items():
        print(f"| {how} | {' | '.join(cell([each[length] for each in seeds]) for length in lengths)} |")


def rows_of(found: dict[str, list[dict[str, Figures]]], levers: Sequence[Lever], unit_steps: int) -> list[Row]:
    """Every figure of every lever over that of the first one."""
    rows = []
    for size, lever, column in product(SIZES, levers, TITLES):
        if lever is not BASE:
            ours, other = ([each[size][column] for each in found[name]] for name in (lever.name, BASE.name))
            note = f"{TITLES[column]} over that of '{BASE.name}', {unit_steps} unit-steps each"
            rows.append(row_of_pairs(f"{size}: {lever.name}", ours, other, TITLES[column], note))
    return rows


def main(
    json_file: JsonFile = None,
    quick: Quick = False,
    seeds: Annotated[int, typer.Option(help="Trainings of each library.")] = 3,
    unit_steps: Annotated[int, typer.Option(help="Of each library.")] = 2400,
    testbed: Annotated[str, typer.Option(help="Name of the recipe that made the teacher.")] = "digits",
) -> None:
    """Print what each lever is worth, and the loss of units by start and length of their span."""
    if quick:
        seeds, unit_steps = 1, 40
    folder = Path(f"runs/ablations-{testbed}-{unit_steps}")
    levers, starts = ((LEVERS[0], LEVERS[1], LEVERS[5]), STARTS[:2]) if quick else (LEVERS, STARTS)
    bed = Bed(folder, testbed, quick)
    jobs = [(lever, seed) for seed in range(seeds) for lever in levers]
    found: dict[str, list[dict[str, Figures]]] = {}
    lengths: dict[str, list[dict[int, float]]] = {}
    with ThreadPoolExecutor(1 if quick else PROCESSES) as pool:
        paths = pool.map(partial(bed.pull, unit_steps), *zip(*jobs, strict=True))
        for (lever, _), path in track(zip(jobs, paths, strict=True), "train and judge libraries", len(jobs)):
            found.setdefault(lever.name, []).append(bed.judged(path))
        several = [(how, seed) for seed in range(seeds) for how in starts]
        losses = pool.map(partial(bed.by_length, unit_steps), *zip(*several, strict=True))
        for (how, _), each in track(zip(several, losses, strict=True), "train single units", len(several)):
            lengths.setdefault(how, []).append(each)
    print_figures(found, levers)
    print_lengths(lengths)
    show("One lever at a time", rows_of(found, levers, unit_steps), json_file)


if __name__ == "__main__":
    typer.run(main)
