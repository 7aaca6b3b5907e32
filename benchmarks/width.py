"""Is a half better cut in depth alone, or in depth and width? Both planned from measured units, at the same size.

    python -m benchmarks.width [--json FILE] [--quick] [--testbed digits]

Both libraries start with the spans of several rules; one also has every width unit: text groups, feed-forwards as
linears or with a quarter of their channels. Each is trained with the same number of unit-steps, a third of them on
candidates, planned anew from what these cost, and trained on. Needs the testbed's teacher (`make demo`,
`make showcase`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import typer

from benchmarks.table import JsonFile, Quick, Row, row_of_pairs, show
from benchmarks.testbeds import COLUMNS, Judge, Library, Testbed, cell, folder_of, judged, train_planned, write_recipe
from ppcl_ds.console import track
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.recipe import load_recipe

SIZE = "-50 %"
KINDS = {"depth": [], "depth and width": ["text", "ffn", "narrow"]}
"""Name of a library -> width units among its candidates."""

UNITS = {"velocity_mse": "MSE", "frechet": "distance", "accuracy": "share", "sample_mse": "MSE"}


def compare(folder: Path, seeds: int, unit_steps: int, testbed: str, quick: bool) -> dict[str, list[ModelFigures]]:
    """Figures of both kinds, with each seed; latencies are taken last, when nothing is trained beside them."""
    jobs = [(kind, seed) for seed in range(seeds) for kind in KINDS]
    judge = Judge(load_recipe(write_recipe(folder / "teacher", 0, 1, testbed)), quick)

    def train(job: tuple[str, int]) -> Path:
        kind, seed = job
        run = folder / f"{kind.replace(' ', '-')}-{seed}"
        if (run / "figures.json").exists():
            return run / "recipe.yaml"
        candidates = ["ppcl", "influence", "uniform"]
        options: dict[str, Any] = {
            "variants": {SIZE: 0.5},
            "rule": "error",
            "candidates": candidates,
            "width": KINDS[kind],
            "testbed": testbed,
        }
        return train_planned(run, seed, unit_steps, **options)

    results: dict[str, list[ModelFigures]] = {kind: [] for kind in KINDS}
    with ThreadPoolExecutor(2) as pool:
        for (kind, _), path in track(zip(jobs, pool.map(train, jobs), strict=True), "libraries", len(jobs)):
            results[kind].append(judged(path, judge)[SIZE])
    for seed in range(seeds):
        for kind in KINDS:
            library = Library(folder / f"{kind.replace(' ', '-')}-{seed}" / "recipe.yaml")
            latency = judge.bench.latency(library.model(library.plan.variants[SIZE]))
            results[kind][seed] = results[kind][seed].model_copy(update={"latency_ms": latency})
    print("| units | parameters | velocity MSE | Fréchet | accuracy | sample MSE |\n|---|---|---|---|---|---|")
    print(
        f"| teacher | {judge.teacher.params:,} | 0 | {judge.teacher.frechet:.3f} | {judge.teacher.accuracy:.3f} | 0 |"
    )
    for kind, figures in results.items():
        cells = [cell([getattr(each, column) for each in figures]) for column in COLUMNS]
        print(f"| {kind} | {cell([float(each.params) for each in figures])} | {' | '.join(cells)} |")
    return results


def main(json_file: JsonFile = None, quick: Quick = False, testbed: Testbed = "digits") -> None:
    """Print the figures of both, and the one over the other."""
    folder = folder_of("width", testbed, quick)
    seeds, unit_steps = (1, 400) if quick else (3, 4800)
    results = compare(folder, seeds, unit_steps, testbed, quick)
    note = f"depth and width over depth alone at {SIZE}, {unit_steps} unit-steps each"
    ours, other = results["depth and width"], results["depth"]

    def of(column: str, unit: str) -> Row:
        mine, theirs = ([float(getattr(each, column)) for each in figures] for figures in (ours, other))
        return row_of_pairs(column, mine, theirs, unit, note)

    rows = [of(column, unit) for column, unit in UNITS.items()]
    rows += [of("params", "parameters"), of("latency_ms", "ms a forward")]
    show("Depth and width over depth alone", rows, json_file)


if __name__ == "__main__":
    typer.run(main)
