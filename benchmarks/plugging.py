"""One trained library: what sets of its units cost, foretold and measured, and quality over size without retraining.

    python -m benchmarks.plugging [--json FILE] [--quick] [--testbed digits]

A library of several rules' spans is trained once. `ppcl plan --from-run` measures its units and some sets
of them; then sets that it has not seen are assembled into stock models, and judged: their errors are held against the
forecast of each measure, and the forecasts against what pictures are worth, Fréchet distance and accuracy. At last the
sets that the planner chooses at every size are judged. Needs the testbed's teacher
(`make demo`, `make showcase`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import matplotlib
import typer

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy.stats import spearmanr

from benchmarks.table import JsonFile, Quick, Row, row, show
from benchmarks.testbeds import Judge, Library, Testbed, folder_of, ppcl, write_recipe
from ppcl_ds.console import track
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.planning.budget import budget_of
from ppcl_ds.planning.error_model import TITLES, Forecast, fitted
from ppcl_ds.planning.swaps import draw_sets, load_swaps
from ppcl_ds.teacher.comparison import FIGURES

CANDIDATES = ["error", "ppcl", "influence", "uniform"]
FEWEST = 5
"""Sets of equally many blocks from which a rank correlation says something."""

PICTURES = {"frechet": "Fréchet", "accuracy": "accuracy"}
"""What pictures are worth."""

BAR = 0.8
"""Rank correlation that is asked of a forecast with what pictures are worth."""


def train_library(run: Path, steps: int, testbed: str) -> Library:
    """A trained and measured library; what was done before is not repeated."""
    path = write_recipe(run, 0, steps, testbed, rule="error", candidates=CANDIDATES)
    library = Library(path)
    if not library.recipe.distilled:
        ppcl("plan", path)
        ppcl("distill", path)
    if load_swaps(library.recipe.swaps_file) is None:
        ppcl("plan", path, "--from-run", run)
    return library


@dataclass(frozen=True)
class Seen:
    """A set of units that the forecast was not fitted to.

    Attributes:
        gone: blocks that it gives up.
        expected: errors that are forecast, by measure, and the objective.
        figures: measured of the stock model.
    """

    gone: int
    expected: dict[str, float]
    figures: ModelFigures

    def found(self, figure: str) -> float:
        """A figure of which less is better."""
        value = getattr(self.figures, figure)
        assert value is not None, f"the judge says {figure}"
        return 1 - value if figure == "accuracy" else float(value)


def foretold(library: Library, judge: Judge, forecast: Forecast, count: int) -> list[Seen]:
    """Sets that were not measured, assembled into stock models and judged."""
    swaps = load_swaps(library.recipe.swaps_file)
    assert swaps is not None
    plan, file = library.trained, library.recipe.run / "unseen.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    sets = [names for names in draw_sets(plan, 1, 2 * count) if swaps.errors_of(names) is None][:count]
    seen = []
    for names in track(sets, "sets that the forecast has not seen", len(sets)):
        units = [plan.unit(name) for name in names]
        expected = forecast.of(units)
        assert expected is not None
        key = " ".join(names)
        if key not in known:
            known[key] = judge.of(library.model(names)).model_dump()
            file.write_text(json.dumps(known))
        gone = sum(unit.span[1] - unit.span[0] for unit in units)
        expected["objective"] = forecast.value(expected)
        seen.append(Seen(gone, expected, ModelFigures.model_validate(known[key])))
    return seen


def curve(library: Library, judge: Judge, forecast: Forecast) -> list[ModelFigures]:
    """Figures of the planner's set at every number of blocks."""
    budget = budget_of(library.recipe.plan, library.teacher, judge.dtype)
    block, sizes = float(budget.blocks.max()), budget.blocks
    found = []
    for gone in track(range(1, len(sizes)), "sizes", len(sizes) - 1):
        chosen = forecast.best(budget, (gone - 0.5) * block, (gone + 0.5) * block)
        if chosen is not None:
            found.append(judge.of(library.model(tuple(forecast.units[place].name for place in chosen))))
    return found


def groups_of(seen: list[Seen]) -> dict[str, list[Seen]]:
    """All sets, and those of equally many blocks where there are enough."""
    groups = {f"all {len(seen)} sets": seen}
    for gone in sorted({each.gone for each in seen}):
        own = [each for each in seen if each.gone == gone]
        if len(own) >= FEWEST:
            groups[f"{len(own)} sets that give up {gone} blocks"] = own
    return groups


def own_measure(seen: list[Seen]) -> list[Row]:
    """Of each measure, Spearman's rank correlation of forecast and measured error, against what is asked of it."""
    rows = []
    for measure, figure in FIGURES.items():
        for name, group in groups_of(seen).items():
            expected, found = [each.expected[measure] for each in group], [each.found(figure) for each in group]
            ratio = mean(a / b for a, b in zip(expected, found, strict=True))
            note = f"Spearman of forecast and measured {TITLES[measure]}; forecast over measured {ratio:.2f} on average"
            asked = 0.95 if group is seen else 0.8
            rows.append(
                row(f"{TITLES[measure]}, {name}", float(spearmanr(expected, found)[0]), asked, "Spearman", note)
            )
    return rows


def pictures(seen: list[Seen]) -> list[Row]:
    """Of each measure and the objective, Spearman of the forecast with what pictures are worth, against the bar."""
    return [
        row(f"{TITLES.get(measure, measure)} / {title}, {name}", ranked(group, measure, figure), BAR, "Spearman", "")
        for measure in ("velocity", "draw", "objective")
        for figure, title in PICTURES.items()
        for name, group in groups_of(seen).items()
    ]


def ranked(seen: list[Seen], measure: str, figure: str) -> float:
    """How well the forecast of a measure ranks sets by a figure of their pictures."""
    return float(spearmanr([each.expected[measure] for each in seen], [each.found(figure) for each in seen])[0])


def print_pictures(seen: list[Seen]) -> None:
    """Spearman of every forecast with Fréchet distance and accuracy, all sets and those of one size."""
    columns = ("velocity", "branches", "draw", "objective")
    titles = [f"{measure}: Fréchet / accuracy" for measure in columns]
    print(f"| sets | {' | '.join(titles)} |\n|{'---|' * (len(columns) + 1)}")
    for name, group in groups_of(seen).items():
        cells = [" / ".join(f"{ranked(group, measure, figure):.2f}" for figure in PICTURES) for measure in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def draw(seen: list[Seen], figures: list[ModelFigures], teacher: ModelFigures, path: Path) -> None:
    """Foretold against measured errors, and quality over size."""
    figure, (*lefts, right) = plt.subplots(1, 3, figsize=(16, 4.2), constrained_layout=True)
    gone = [each.gone for each in seen]
    for left, measure in zip(lefts, ("velocity", "draw"), strict=True):
        expected = [each.expected[measure] for each in seen]
        measured = [each.found(FIGURES[measure]) for each in seen]
        dots = left.scatter(expected, measured, c=gone, cmap="viridis", s=22)
        ends = min(expected + measured), max(expected + measured)
        left.plot(ends, ends, color="0.6", lw=1)
        title = TITLES[measure]
        left.set(xscale="log", yscale="log", xlabel=f"{title}, foretold", ylabel=f"{title}, measured")
    figure.colorbar(dots, label="blocks given up")
    sizes = [each.block_params_ratio for each in figures]
    right.plot(sizes, [each.guided_mse or 0 for each in figures], ".-", label="velocity MSE")
    right.plot(sizes, [each.short_mse or 0 for each in figures], ".-", label="few-step MSE")
    right.plot(sizes, [each.frechet for each in figures], ".-", label="Fréchet distance")
    right.plot([1], [teacher.frechet], "x", color="C1", label="the teacher's Fréchet distance")
    right.plot(sizes, [1 - (each.accuracy or 0) for each in figures], ".-", label="wrong images, share")
    right.set(yscale="log", xlabel="share of the teacher's block parameters")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(json_file: JsonFile = None, quick: Quick = False, testbed: Testbed = "digits") -> None:
    """Print how well the forecast ranks sets of units, and the figures of the planner's sets at every size."""
    run = folder_of("plugging", testbed, quick)
    library = train_library(run, 20 if quick else 300, testbed)
    judge = Judge(library.recipe, quick)
    swaps = load_swaps(library.recipe.swaps_file)
    assert swaps is not None
    forecast = fitted(swaps, library.recipe.plan.objective)
    seen = foretold(library, judge, forecast, 8 if quick else 60)
    print_pictures(seen)
    figures = curve(library, judge, forecast)
    print("| blocks left | velocity MSE | branch MSE | few-step MSE | sample MSE | Fréchet | accuracy |")
    print("|---|---|---|---|---|---|---|")
    for each in [judge.teacher, *figures]:
        errors = (each.guided_mse, each.branch_mse, each.short_mse, each.sample_mse)
        cells = (*(f"{error:.4f}" for error in errors), f"{each.frechet:.3f}", f"{each.accuracy:.3f}")
        print(f"| {each.block_params_ratio:.0%} | {' | '.join(cells)} |")
    draw(seen, figures, judge.teacher, run / "plugging.png")
    show("How well the forecasts rank sets of units", own_measure(seen) + pictures(seen), json_file)
    print(f"wrote {run}/plugging.png")


if __name__ == "__main__":
    typer.run(main)
