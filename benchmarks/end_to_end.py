"""What is end-to-end training worth? Units alone, the whole variant alone, and one after the other, at equal cost.

    python -m benchmarks.end_to_end [--json FILE] [--quick]

On the digits, at -50 % and at -75 %. A block-step is one optimizer step of one block, be it a unit that is trained by
itself or a block of a variant that is trained as a whole; all three ways get the same number of them. `fine-tune`
starts with untrained units: copies of their spans' first blocks. `both` spends half of its block-steps on units, and
half on the whole variant that they make. Needs the demo's teacher (`make demo`); what is trained is not trained again.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import typer
import yaml

from benchmarks.table import JsonFile, Quick, row_of_pairs, show
from benchmarks.testbeds import BATCH, COLUMNS, Judge, cell, ppcl, units_of, write_recipe
from ppcl_ds.console import track
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.export.load import load_model
from ppcl_ds.recipe import load_recipe

SIZES = {"-50 %": 0.5, "-75 %": 0.75}
WAYS = {"local": 1.0, "fine-tune": 0.0, "both": 0.5}
"""Name -> share of the block-steps that go into the units alone."""

OPTIMIZER = {"lr": 2.0e-3, "betas": [0.9, 0.99], "weight_decay": 0.0, "warmup_steps": 20}

Results = dict[tuple[str, str], list[ModelFigures]]
"""Size and way -> figures of each seed."""


def train(run: Path, size: str, share: float, seed: int, block_steps: int) -> Path:
    """Train one variant one way; returns its transformer folder."""
    options: dict[str, Any] = {"rule": "error", "variants": {"variant": SIZES[size]}}
    path = write_recipe(run, seed, 1, **options)
    ppcl("plan", path)
    plan = yaml.safe_load(load_recipe(path).plan_file.read_text())
    units = units_of(path)
    blocks = plan["blocks"] - sum(unit["span"][1] - unit["span"][0] for unit in plan["units"])
    # The learning rate of a step is that before it: the first one, in warm-up, is zero, and leaves units untrained.
    local, whole = max(1, round(block_steps * share / units)), round(block_steps * (1 - share) / blocks)
    write_recipe(run, seed, max(local, 2), **options)
    if whole:
        tuning = {"steps": whole, "micro_batch": BATCH["digits"], "micro_batches_per_step": 1, "optimizer": OPTIMIZER}
        recipe = yaml.safe_load(path.read_text())
        recipe["finetune"] = tuning | {"log_every": 50, "checkpoint_every": 10**6}
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    ppcl("distill", path, "--until", str(local))
    if whole:
        ppcl("finetune", path, "--variant", "variant")
    name = "variant-finetuned" if whole else "variant"
    ppcl("consolidate", path, "--variant", name)
    return load_recipe(path).pruned(name)


def compare(folder: Path, seeds: int, block_steps: int) -> tuple[Results, ModelFigures]:
    """Train and judge every way at every size with every seed; also the teacher's own figures."""
    jobs = [(seed, size, way) for seed in range(seeds) for size in SIZES for way in WAYS]
    judge = Judge(load_recipe(write_recipe(folder / "teacher", 0, 1)))

    def run_of(job: tuple[int, str, str]) -> Path:
        seed, size, way = job
        return folder / f"{size.strip('- %')}-{way}-{seed}"

    def do(job: tuple[int, str, str]) -> Path | None:
        seed, size, way = job
        if (run_of(job) / "figures.json").exists():
            return None
        return train(run_of(job), size, WAYS[way], seed, block_steps)

    results: Results = {}
    with ThreadPoolExecutor(2) as pool:
        for job, model in track(zip(jobs, pool.map(do, jobs), strict=True), "train and judge variants", len(jobs)):
            file = run_of(job) / "figures.json"
            if model is not None:
                file.write_text(judge.of(load_model(model, torch.float32)).model_dump_json(indent=1))
            results.setdefault(job[1:], []).append(ModelFigures.model_validate(json.loads(file.read_text())))
    return results, judge.teacher


def print_figures(results: Results, teacher: ModelFigures) -> None:
    """Mean and spread over seeds, a row each size and way, as Markdown."""
    print("| size | trained | velocity MSE | Fréchet | accuracy | sample MSE |\n|---|---|---|---|---|---|")
    print(f"| | teacher | 0 | {teacher.frechet:.3f} | {teacher.accuracy:.3f} | 0 |")
    for (size, way), figures in results.items():
        cells = [cell([getattr(each, column) for each in figures]) for column in COLUMNS]
        print(f"| {size} | {way} | {' | '.join(cells)} |")


def main(json_file: JsonFile = None, quick: Quick = False) -> None:
    """Print the figures of every way, and velocity error and Fréchet distance over those of units alone."""
    folder = Path("runs/end-to-end-quick" if quick else "runs/end-to-end")
    seeds, block_steps = (1, 120) if quick else (3, 2400)
    results, teacher = compare(folder, seeds, block_steps)
    print_figures(results, teacher)
    rows = []
    for size in SIZES:
        both = results[size, "both"]
        for way in ("local", "fine-tune"):
            for column, unit in (("velocity_mse", "MSE"), ("frechet", "distance")):
                ours, other = ([getattr(each, column) for each in figures] for figures in (both, results[size, way]))
                rows.append(
                    row_of_pairs(f"{size}: both / {way}", ours, other, unit, f"{column}, {block_steps} block-steps")
                )
        assert teacher.frechet is not None
        distances = [float(each.frechet or 0) for each in both]
        note = f"Fréchet distance over the teacher's own, mean {mean(distances):.3f}"
        rows.append(row_of_pairs(f"{size}: both / teacher", distances, [teacher.frechet] * len(both), "distance", note))
    show("Units first, then the whole, over either alone", rows, json_file)


if __name__ == "__main__":
    typer.run(main)
