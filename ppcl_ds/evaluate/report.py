"""The report of an evaluation: samples.png, report.json and one self-contained report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from torch import Tensor

from ppcl_ds.atomic import atomic_write
from ppcl_ds.evaluate.figures import Figures, ModelFigures
from ppcl_ds.pages import as_png, inline, render

Curves = Mapping[str, Sequence[tuple[int, float]]]
_COLUMNS = 16
"""Pictures of each model in samples.png."""


def draw_samples(pictures: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """One row of pictures a model, the same noise down each column.

    Args:
        pictures: name -> (N, C, H, W) in [-1, 1].
        captions: N prompts; written above the columns.
    """
    columns = min(_COLUMNS, len(captions))
    figure, axes = plt.subplots(
        len(pictures), columns, figsize=(0.75 * columns + 1.6, 0.85 * len(pictures) + 0.3), squeeze=False
    )
    for row, (name, images) in zip(axes, pictures.items(), strict=True):
        for axis, image in zip(row, images[:columns], strict=True):
            grey = image.shape[0] == 1
            axis.imshow(image.permute(1, 2, 0).clamp(-1, 1) * 0.5 + 0.5, cmap="gray" if grey else None, vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, caption in zip(axes[0], captions, strict=False):
        axis.set_title("\n".join(caption.split()[-2:]), fontsize=6)
    figure.tight_layout(pad=0.3)
    atomic_write(path, as_png(figure))


def write_report(
    folder: Path, models: Sequence[ModelFigures], losses: Curves, heldout: Curves, facts: Mapping[str, str]
) -> None:
    """Write `report.json` and `report.html` beside `samples.png`.

    Args:
        losses: unit -> (step, loss), as TensorBoard has them.
        heldout: variant -> (step, velocity error on held-out data).
        facts: lines that say what was measured, name -> text.
    """
    atomic_write(folder / "report.json", Figures(models=models).model_dump_json(indent=1) + "\n")
    heatmap = folder / "probe" / "heatmap.png"
    page = render(
        "ppcl_ds.evaluate",
        "report.html.jinja",
        models=models,
        facts=facts,
        samples=inline((folder / "samples.png").read_bytes()),
        heatmap=inline(heatmap.read_bytes()) if heatmap.exists() else None,
        curves=inline(_plot_curves(losses, heldout)) if losses else None,
    )
    atomic_write(folder / "report.html", page)


def _plot_curves(losses: Curves, heldout: Curves) -> bytes:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    titles = ("Loss of each unit (sum over streams)", "Velocity error of each variant on held-out data")
    for axis, curves, title in zip(axes, (losses, heldout), titles, strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 10 else None)
        axis.set(title=title, xlabel="step", yscale="log")
        if curves:
            axis.legend(fontsize=7, ncols=2)
    return as_png(figure)
