"""One trained library: what sets of its units cost, foretold and measured, and quality over size without retraining.

    python -m benchmarks.plugging [--json FILE] [--quick] [--testbed digits]

A library of several rules' spans is trained once. `ppcl plan --from-run` measures its units and some sets
of them; then sets that it has not seen are assembled into stock models, and their velocity errors are held against the
forecast. At last the sets that the planner chooses at every size are judged. Needs the testbed's teacher
(`make demo`, `make showcase`).
"""

from __future__ import annotations

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
from ppcl_ds.planning.error_model import ErrorModel, fitted
from ppcl_ds.planning.programme import cheapest
from ppcl_ds.planning.swaps import draw_sets, load_swaps

CANDIDATES = ["error", "ppcl", "influence", "uniform"]
FEWEST = 5
"""Sets of equally many blocks from which a rank correlation says something."""


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


def foretold(library: Library, judge: Judge, forecast: ErrorModel, count: int) -> list[tuple[int, float, float]]:
    """Blocks given up, error foretold and measured, of sets that the forecast was not fitted to."""
    swaps = load_swaps(library.recipe.swaps_file)
    assert swaps is not None
    plan = library.trained
    sets = [names for names in draw_sets(plan, 1, 2 * count) if swaps.error_of(names) is None][:count]
    points = []
    for names in track(sets, "sets that the forecast has not seen", len(sets)):
        units = [plan.unit(name) for name in names]
        expected = forecast.of(units)
        assert expected is not None
        gone = sum(unit.span[1] - unit.span[0] for unit in units)
        points.append((gone, expected, judge.velocity_mse(library.model(names))))
    return points


def curve(library: Library, judge: Judge, forecast: ErrorModel) -> list[ModelFigures]:
    """Figures of the planner's set at every number of blocks."""
    budget = budget_of(library.recipe.plan, library.teacher, judge.dtype)
    candidates, block, sizes = forecast.candidates(budget), float(budget.blocks.max()), budget.blocks
    found = []
    for gone in track(range(1, len(sizes)), "sizes", len(sizes) - 1):
        chosen = cheapest(candidates, (gone - 0.5) * block, (gone + 0.5) * block)
        if chosen is not None:
            found.append(judge.of(library.model(tuple(forecast.units[place].name for place in chosen))))
    return found


def correlations(points: list[tuple[int, float, float]]) -> list[Row]:
    """Spearman's rank correlation over all sets and within sets of equally many blocks, against what is asked of it."""
    groups = {gone: [p for p in points if p[0] == gone] for gone in sorted({p[0] for p in points})}
    rows = [_correlation(f"all {len(points)} sets", points, 0.95)]
    large = {gone: group for gone, group in groups.items() if len(group) >= FEWEST}
    rows += [_correlation(f"{len(group)} sets that give up {gone} blocks", group, 0.8) for gone, group in large.items()]
    return rows


def _correlation(name: str, points: list[tuple[int, float, float]], asked: float) -> Row:
    _, expected, measured = zip(*points, strict=True)
    ratio = mean(a / b for a, b in zip(expected, measured, strict=True))
    note = f"Spearman of the forecast with the measured velocity MSE; forecast over measured {ratio:.2f} on average"
    return row(name, float(spearmanr(expected, measured)[0]), asked, "Spearman", note)


def draw(
    points: list[tuple[int, float, float]], figures: list[ModelFigures], teacher: ModelFigures, path: Path
) -> None:
    """Foretold against measured error, and quality over size."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    gone, expected, measured = zip(*points, strict=True)
    dots = left.scatter(expected, measured, c=gone, cmap="viridis", s=22)
    ends = min(expected + measured), max(expected + measured)
    left.plot(ends, ends, color="0.6", lw=1)
    left.set(xscale="log", yscale="log", xlabel="velocity MSE, foretold", ylabel="velocity MSE, measured")
    figure.colorbar(dots, label="blocks given up")
    sizes = [each.block_params_ratio for each in figures]
    right.plot(sizes, [each.velocity_mse for each in figures], ".-", label="velocity MSE")
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
    judge = Judge(library.recipe)
    swaps = load_swaps(library.recipe.swaps_file)
    assert swaps is not None
    forecast = fitted(swaps)
    points = foretold(library, judge, forecast, 8 if quick else 60)
    figures = curve(library, judge, forecast)
    print("| blocks left | velocity MSE | Fréchet | accuracy | sample MSE |\n|---|---|---|---|---|")
    for each in [judge.teacher, *figures]:
        cells = (f"{each.velocity_mse:.4f}", f"{each.frechet:.3f}", f"{each.accuracy:.3f}", f"{each.sample_mse:.4f}")
        print(f"| {each.block_params_ratio:.0%} | {' | '.join(cells)} |")
    draw(points, figures, judge.teacher, run / "plugging.png")
    show("How well the forecast ranks sets of units", correlations(points), json_file)
    print(f"wrote {run}/plugging.png")


if __name__ == "__main__":
    typer.run(main)
