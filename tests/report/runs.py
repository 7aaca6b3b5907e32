"""Runs that nobody has run: folders with what each step of the road would have left, for any number of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from ppcl_ds.atomic import atomic_write
from ppcl_ds.evaluate.compared import SetFigures
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.evaluate.report import Figures, draw_samples, save_pictures
from ppcl_ds.planning.show import Line, Outlook, Point, save_outlook
from ppcl_ds.probing.report import Figure, Matrix, ProbeReport, ppcl_spans
from ppcl_ds.recipe import Recipe
from ppcl_ds.units.plan import UNDISTILLED, Plan, UnitPlan

STAGES = ("nothing", "probed", "planned", "trained", "consolidated", "evaluated")
TEACHER = "SomeTransformer2DModel"
LONGEST = 8


def recipe_of(run: Path, variants: Sequence[str] = ("large", "small")) -> Recipe:
    """A recipe of two variants; nothing that it names needs to be there."""
    shares = {name: 0.3 + 0.2 * number for number, name in enumerate(variants)}
    return Recipe.model_validate(
        {
            "run": str(run),
            "data": {"source": "pictures", "shards": "shards", "images": {"size": 64}},
            "teacher": {"path": "models/teacher"},
            "plan": {"variants": shares},
            "topology": {"stages": 2},
            "distill": {"steps": 400, "micro_batch": 4, "micro_batches_per_step": 2},
            "finetune": {"variants": [variants[0]], "steps": 100, "micro_batch": 4, "micro_batches_per_step": 2},
        }
    )


def probe_of(blocks: int) -> ProbeReport:
    """A report in which the blocks in the last fifth but the very last are cheap, and the first one is dear."""
    place = np.arange(blocks) / (blocks - 1)
    alone = 0.02 + 0.3 * np.exp(-8 * place) + 0.05 * (place > 0.97) - 0.015 * ((place > 0.75) & (place < 0.95))
    matrix: Matrix = [[None] * blocks for _ in range(blocks)]
    cka: Matrix = [[None] * blocks for _ in range(blocks)]
    for u in range(blocks):
        for v in range(u, min(blocks, u + LONGEST)):
            error = float(alone[u + 1 : v + 1].sum() * (1 + 0.1 * (v - u)))
            matrix[u][v] = error if v > u else None
            cka[u][v] = math.exp(-error)
    row: Matrix = [[float(value) for value in alone]]
    spread: Matrix = [[None if value is None else value / 10 for value in values] for values in matrix]
    figures = {
        stream: {
            "cka": Figure(value=cka, spread=spread),
            "error": Figure(value=matrix, spread=spread),
            "influence": Figure(value=row, spread=row),
        }
        for stream in ("image", "text", "mean")
    }
    spans = ppcl_spans(cka, [range(blocks)])
    return ProbeReport(
        teacher=TEACHER, tokens={"image": 123456, "text": 7890}, cka=cka, error=matrix, spans=spans,
        unstable=spans[:1], unused=["text"], figures=figures,
    )  # fmt: skip


def plan_of(blocks: int, variants: Sequence[str] = ("large", "small"), tag: str = "", teacher: str = TEACHER) -> Plan:
    """Depth units over the second half, and one narrowed block, in two variants."""
    half, third = blocks // 2, blocks // 3
    units = (
        UnitPlan(name=f"middle{tag}", span=(half, half + 1), streams=("image", "text")),
        UnitPlan(name=f"late{tag}", span=(half + 2, min(blocks - 2, half + 1 + third)), streams=("image", "text")),
        UnitPlan(name=f"thin{tag}", kind="ffn", span=(1, 1), streams=("image",), keep=0.25),
    )
    chosen: dict[str, tuple[str, ...]] = {
        variants[0]: (units[0].name, units[2].name),
        variants[1]: (units[0].name, units[1].name),
    }
    return Plan(teacher=teacher, blocks=blocks, units=units, variants=chosen)


def outlook_of(plan: Plan) -> Outlook:
    lines = [
        Line(name, len(kept), "units", 10**6, len(kept) / plan.blocks, {"error": 0.05 * (place + 1)}, {}, {})
        for place, (name, kept) in enumerate((name, plan.places(name)) for name in plan.variants)
    ]
    points = [Point(1 - 0.1 * step, {"error": 0.01 * 2**step}, f"set {step}") for step in range(6)]
    measures = {"error": "probed error"}
    return Outlook(plan=plan, budget="parameters", title="probed error", measures=measures, lines=lines, points=points)


def write_curves(recipe: Recipe, plan: Plan, variant: str) -> None:
    """Logs of a distillation of 400 steps on two ranks, and of a fine-tuning of 100 on one."""
    random = np.random.default_rng(0)
    with SummaryWriter(str(recipe.distillation.board)) as board:
        for step in range(10, 401, 10):
            for unit in plan.units:
                board.add_scalar(f"{unit.name}/loss/image", math.exp(-step / 150) + 0.02 * random.random(), step)
            for rank in range(2):
                board.add_scalar(f"memory_gib/rank_{rank}", 1.0, step)
            board.add_scalar("run/samples_per_second", 4.0, step)
            board.add_scalar("seconds/preview", 0.5, step)
        for step in (100, 200, 400):
            for place, name in enumerate(plan.variants):
                board.add_scalar(f"heldout/velocity_mse/{name}", 0.1 * (place + 1) / step, step)
    with SummaryWriter(str(recipe.finetuning(variant).board)) as board:
        for step in range(10, 101, 10):
            board.add_scalar("run/loss", 1 / step, step)
            board.add_scalar("run/samples_per_second", 8.0, step)
            board.add_scalar("memory_gib/rank_0", 1.0, step)
        for step in (50, 100):
            board.add_scalar("heldout/velocity/0.1", 0.02, step)
            board.add_scalar("heldout/velocity/0.9", 0.04, step)
    progress = '{"state": "done", "what": "distill", "step": 400, "total": 400}'
    atomic_write(recipe.distillation.progress, progress)


def figures_of(
    variants: Sequence[str], sets: Sequence[SetFigures] = (), facts: dict[str, str] | None = None
) -> Figures:
    """A teacher, variants of which the second is worse, the first fine-tuned too, and untrained ones."""

    def row(name: str, share: float, accuracy: float, error: float) -> ModelFigures:
        return ModelFigures(
            name=name, params=round(2e7 * share), block_params_ratio=share, latency_ms=12 * share, accuracy=accuracy,
            frechet=0.4 + error, images=1000, velocity_mse=error, sample_mse=2 * error,
            by_noise=[(0.2 * place, error * place + 1e-3) for place in range(1, 5)] if error else [(0.2, 0.0)],
        )  # fmt: skip

    first, second = variants
    rows = [row("teacher", 1.0, 0.99, 0.0), row(f"{first}-finetuned", 0.5, 0.99, 0.01), row(first, 0.5, 0.985, 0.02)]
    rows += [row(first + UNDISTILLED, 0.5, 0.4, 0.3), row(second, 0.25, 0.9, 0.05)]
    return Figures(models=rows, sets=sets, facts=facts or {"Teacher": f"{TEACHER} from models/teacher"})


def make_run(
    run: Path, blocks: int = 12, stage: str = "evaluated", variants: Sequence[str] = ("large", "small"), tag: str = "",
    pixels: int = 8, **figures: Any,
) -> Recipe:  # fmt: skip
    """A run folder as it is after a stage of the road.

    Args:
        tag: at the end of every unit's name and of every prompt.
        pixels: of a side of its pictures.
    """
    recipe, plan = recipe_of(run, variants), plan_of(blocks, variants, tag)
    run.mkdir(parents=True, exist_ok=True)
    reached = STAGES.index(stage)
    if reached >= 1:
        atomic_write(recipe.probe_folder / "report.json", probe_of(blocks).model_dump_json())
    if reached >= 2:
        plan.save(recipe.plan_file)
        save_outlook(recipe.swaps_file.parent, outlook_of(plan))
    if reached >= 3:
        write_curves(recipe, plan, variants[0])
    if reached >= 4:
        for name in (*variants, f"{variants[0]}-finetuned"):
            atomic_write(recipe.pruned(name) / "config.json", "{}")
    if reached >= 5:
        names = [model.name for model in figures_of(variants).models]
        random = torch.Generator().manual_seed(0)
        base = torch.rand(4, 3, 8, 8, generator=random) * 2 - 1
        drawn = torch.nn.functional.interpolate(base, size=(pixels, pixels), mode="bicubic")
        images = {name: drawn * (1 - 0.15 * place) for place, name in enumerate(names)}
        prompts = [f"a red house by a lake, number {number}{tag}" for number in range(4)]
        draw_samples(images, [prompt.replace("$", "") for prompt in prompts], run / "samples.png")
        save_pictures(images, prompts, run)
        atomic_write(run / "report.json", figures_of(variants, **figures).model_dump_json())
    return recipe
