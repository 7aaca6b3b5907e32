"""The table of the demo's spread: means and deviations as numpy has them, a recipe a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.spread import markdown, rows_of, write_recipe
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.recipe import load_recipe
from ppcl_ds.shipped import shipped

ACCURACY = [[0.99, 0.98, 0.97], [0.9, 0.8, 0.91]]


def seeds() -> list[list[ModelFigures]]:
    """Two models of three seeds."""
    return [
        [
            ModelFigures(
                name=name,
                params=1,
                block_params_ratio=1,
                latency_ms=1,
                accuracy=ACCURACY[place][seed],
                frechet=0.4 + seed,
                velocity_mse=0.1 * place * (seed + 1),
                sample_mse=0.2 * place,
            )
            for place, name in enumerate(("teacher", "small"))
        ]
        for seed in range(3)
    ]


def test_means_and_deviations_are_numpys() -> None:
    mean, deviation = 100 * np.mean(ACCURACY[1]), 100 * np.std(ACCURACY[1], ddof=1)
    assert f"| small | {mean:.1f} ± {deviation:.1f} % |" in markdown(seeds())
    rows = {row.name: row for row in rows_of(seeds())}
    accuracy = rows["small: accuracy"]
    assert accuracy.ours == pytest.approx(mean)
    assert accuracy.other == pytest.approx(100 * np.mean(ACCURACY[0]))
    assert accuracy.ratio == pytest.approx(accuracy.ours / accuracy.other)
    assert f"standard deviation {deviation:.3g}" in accuracy.note
    velocity = rows["small: velocity MSE"]
    assert (velocity.ours, velocity.other) == (pytest.approx(0.2), 0)


def test_seeds_differ_in_run_folder_and_seed_alone(tmp_path: Path) -> None:
    first, second = (load_recipe(write_recipe(tmp_path, seed, quick=False)) for seed in (0, 1))
    assert (first.seed, second.seed) == (0, 1)
    assert {first.run, second.run} == {tmp_path / "spread-0", tmp_path / "spread-1"}
    assert first.distill == second.distill == load_recipe(shipped("recipes/digits.yaml")).distill
    assert load_recipe(write_recipe(tmp_path, 0, quick=True)).distill.steps < first.distill.steps
