"""`ppcl evaluate`: measure the teacher, every variant, and every variant as it was before distillation."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from functools import partial

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from ppcl_ds import launch
from ppcl_ds.console import track
from ppcl_ds.data.encoders import image_encoder
from ppcl_ds.data.noising import DTYPES
from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.figures import Bench, ModelFigures
from ppcl_ds.evaluate.report import draw_samples, write_report
from ppcl_ds.export.card import FACTS, write_card
from ppcl_ds.export.load import load_model
from ppcl_ds.export.model_folder import weights_digest
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.teacher import Teacher, open_teacher
from ppcl_ds.units.plan import UNDISTILLED, Plan, finetuned, load_plan
from ppcl_ds.units.variant import assembled
from ppcl_ds.watch.tensorboard import read_scalars, unit_losses


def evaluate(recipe: Recipe) -> None:
    """Measure, write `samples.png`, `report.json`, `report.html` and the models' cards, print the table."""
    teacher = open_teacher(recipe)
    plan = load_plan(recipe.plan_file, teacher)
    for variant in plan.variants:
        if not any((recipe.pruned(name) / "config.json").exists() for name in (variant, finetuned(variant))):
            raise UserError(f"{recipe.pruned(variant)} is missing; run `ppcl consolidate RECIPE` first")
    device = launch.device()
    bench = Bench(recipe, teacher.caller, device)
    decode: Callable[[Tensor], Tensor] = image_encoder(recipe.data, device).decode
    rows: list[ModelFigures] = []
    images: dict[str, Tensor] = {}
    models = list(_models(recipe, teacher, plan))
    for name, load in track(models, "evaluate", len(models)):
        figures, images[name] = bench.measure(name, load(), decode)
        if (recipe.pruned(name).parent / FACTS).exists():
            figures.weights = weights_digest(recipe.pruned(name).parent)
        rows.append(figures)
    draw_samples(images, bench.captions, recipe.run / "samples.png")
    scalars = read_scalars(recipe.distillation.board) if recipe.distillation.board.exists() else {}
    prefix = "heldout/velocity_mse/"
    heldout = {name.removeprefix(prefix): curve for name, curve in scalars.items() if name.startswith(prefix)}
    write_report(recipe.run, rows, unit_losses(scalars), heldout, _facts(recipe, teacher, device))
    for name, _ in models:
        write_card(recipe.pruned(name).parent, [row.model_dump() for row in rows])
    _show(rows)
    print(f"wrote samples.png, report.json and report.html into {recipe.run}")


def _models(recipe: Recipe, teacher: Teacher, plan: Plan) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Name and loader of every model; each is loaded when its turn comes, so one at a time is in memory."""
    dtype = DTYPES[recipe.teacher.precision]
    yield "teacher", partial(load_model, teacher.files.folder, dtype)
    for variant in plan.variants:
        for name in (finetuned(variant), variant):
            if (recipe.pruned(name) / "config.json").exists():
                yield name, partial(load_model, recipe.pruned(name), dtype)
        yield variant + UNDISTILLED, partial(_undistilled, teacher, plan, variant, dtype)


def _undistilled(teacher: Teacher, plan: Plan, variant: str, dtype: torch.dtype) -> nn.Module:
    model = assembled(teacher, plan, variant, None)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(teacher.files.runs_as(name, dtype))
    return model


def _facts(recipe: Recipe, teacher: Teacher, device: torch.device) -> dict[str, str]:
    settings = recipe.evaluate
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or 'CPU'}"
    return {
        "Teacher": f"{teacher.class_name} from {teacher.files.folder}",
        "Images": f"{settings.samples} a model, {settings.steps} Euler steps, guidance {settings.guidance:g}, "
        f"seed {recipe.seed}",
        "Distillation": f"{recipe.distill.steps} steps of "
        f"{recipe.distill.micro_batch * recipe.distill.micro_batches_per_step} samples",
        "Latency": f"one forward of one sample on {name}, {torch.get_num_threads()} CPU threads, "
        f"{recipe.teacher.precision}",
    }


def _show(rows: list[ModelFigures]) -> None:
    columns = ("params", "blocks", "ms", "acc.", "Fréchet", "velocity", "sample")
    table = Table("model", *columns, box=SIMPLE, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for m in rows:
        table.add_row(
            escape(m.name),
            f"{m.params / 1e6:.2f}M",
            f"{m.block_params_ratio:.0%}",
            f"{m.latency_ms:.1f}",
            "-" if m.accuracy is None else f"{m.accuracy:.1%}",
            "-" if m.frechet is None else f"{m.frechet:.3f}",
            f"{m.velocity_mse:.4f}",
            f"{m.sample_mse:.4f}",
        )
    Console().print(table)
