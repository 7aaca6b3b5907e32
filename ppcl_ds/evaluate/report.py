"""The report of an evaluation: samples.png, report.json and one self-contained report.html."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image
from pydantic import BaseModel, ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ppcl_ds.atomic import atomic_write
from ppcl_ds.early import UNDISTILLED
from ppcl_ds.errors import UserError, brief
from ppcl_ds.evaluate.compared import SetFigures
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.evaluate.speed import gains, read_speed
from ppcl_ds.pages import as_png, inline, render

_COLUMNS = 16
"""Images of each model in samples.png."""
_SIDE = 384
"""Pixels of an image on the page, at most."""
_SMALL = 160
"""Smaller images are enlarged to about this, by a whole number, so that they can be seen."""


class Figures(BaseModel):
    """The content of report.json; `facts` are lines that say what was measured, name -> text."""

    models: Sequence[ModelFigures]
    sets: Sequence[SetFigures] = ()
    facts: Mapping[str, str] = {}


@dataclass(frozen=True)
class Curves:
    """What TensorBoard has of the training.

    Attributes:
        losses: unit -> (step, loss).
        heldout: variant -> (step, velocity error on held-out data).
    """

    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    heldout: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)


def draw_samples(images: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """One row of images a model, the same noise down each column.

    Args:
        images: name -> (N, C, H, W) in [-1, 1].
        captions: N prompts; written above the columns.
    """
    columns = min(_COLUMNS, len(captions))
    figure, axes = plt.subplots(
        len(images), columns, figsize=(0.75 * columns + 1.6, 0.85 * len(images) + 0.3), squeeze=False
    )
    for row, (name, drawn) in zip(axes, images.items(), strict=True):
        for axis, image in zip(row, drawn[:columns], strict=True):
            grey = image.shape[0] == 1
            axis.imshow(image.permute(1, 2, 0).clamp(-1, 1) * 0.5 + 0.5, cmap="gray" if grey else None, vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, caption in zip(axes[0], captions, strict=False):
        axis.set_title("\n".join(caption.split()[-2:]), fontsize=6)
    figure.tight_layout(pad=0.3)
    atomic_write(path, as_png(figure))


def read_report(path: Path) -> Figures:
    """What `report.json` says.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        return Figures.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as fault:
        raise UserError(f"{path} cannot be read ({brief(fault)}); run `ppcl evaluate RECIPE` first") from None


def write_report(folder: Path, figures: Figures, curves: Curves) -> None:
    """Write `report.json` and `report.html` beside `samples.png`."""
    atomic_write(folder / "report.json", figures.model_dump_json(indent=1) + "\n")
    heatmap = folder / "probe" / "heatmap.png"
    page = render(
        "ppcl_ds.evaluate",
        "report.html.jinja",
        models=figures.models,
        sets=figures.sets,
        image=lambda name: _shown(folder / name),
        facts=figures.facts,
        speed=(speed := read_speed(folder)),
        gains=gains(speed),
        samples=inline((folder / "samples.png").read_bytes()),
        front=inline(_plot_front(figures.models)),
        noise=inline(_plot_noise(figures.models)) if any(m.by_noise for m in figures.models) else None,
        heatmap=inline(heatmap.read_bytes()) if heatmap.exists() else None,
        curves=inline(_plot_curves(curves)) if curves.losses else None,
    )
    atomic_write(folder / "report.html", page)


def show_sets(sets: Sequence[SetFigures]) -> None:
    """Print a table a prompt set: scores of every model, and what they say of variants."""
    for each in sets:
        models = list(dict.fromkeys(name for score in each.scores for name in score.values))
        table = Table("model", *(escape(score.score) for score in each.scores), box=SIMPLE, title=escape(each.name))
        for model in models:
            cells = []
            for score in each.scores:
                cell = f"{score.values[model]:.4g}" if model in score.values else "-"
                difference = score.differences.get(model)
                cells.append(f"{cell} {difference.verdict}" if difference else cell)
            table.add_row(escape(model), *cells)
        Console().print(table)


def _shown(path: Path) -> str:
    """An image as the page holds it in itself: as small as it can be and still be seen."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if (factor := _SMALL // max(image.size)) > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points of which no other has both less of the one and less of the other, from left to right."""
    front: list[int] = []
    for number in sorted(range(len(points)), key=lambda number: points[number]):
        if not front or points[number][1] < points[front[-1]][1]:
            front.append(number)
    return front


def _plot_front(models: Sequence[ModelFigures]) -> bytes:
    """Error over size and over latency; the line joins models that none beats in both."""
    shown = [model for model in models if not model.name.endswith(UNDISTILLED)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    for axis, (label, sizes) in zip(
        axes,
        {
            "parameters, millions": [model.params / 1e6 for model in shown],
            "ms a forward": [model.latency_ms for model in shown],
        }.items(),
        strict=True,
    ):
        points = [(size, model.sample_mse) for size, model in zip(sizes, shown, strict=True)]
        axis.scatter(*zip(*points, strict=True), color="tab:blue")
        axis.plot(*zip(*(points[number] for number in pareto(points)), strict=True), color="tab:orange", zorder=0)
        for model, point in zip(shown, points, strict=True):
            axis.annotate(model.name, point, textcoords="offset points", xytext=(4, 4), fontsize=8)
        axis.set(xlabel=label, ylabel="sample MSE to the teacher")
        axis.margins(0.15)
    return as_png(figure)


def _plot_noise(models: Sequence[ModelFigures]) -> bytes:
    figure, axis = plt.subplots(figsize=(7, 3.6), constrained_layout=True)
    for model in models[1:]:  # the first is the teacher
        axis.plot(*zip(*model.by_noise, strict=True), marker="o", label=model.name)
    axis.set(xlabel="place on the ladder of noise: 0 is pure noise", ylabel="velocity MSE to the teacher", yscale="log")
    axis.legend(fontsize=7)
    return as_png(figure)


def _plot_curves(curves: Curves) -> bytes:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    titles = ("Loss of each unit (sum over streams)", "Velocity error of each variant on held-out data")
    for axis, lines, title in zip(axes, (curves.losses, curves.heldout), titles, strict=True):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 10 else None)
        axis.set(title=title, xlabel="step", yscale="log")
        if lines:
            axis.legend(fontsize=7, ncols=2)
    return as_png(figure)
