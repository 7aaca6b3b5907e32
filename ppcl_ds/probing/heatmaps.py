"""A probe report for people: its figures as PNG files and in TensorBoard, span length over block."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ppcl_ds.atomic import atomic_folder, atomic_write
from ppcl_ds.pages import as_png
from ppcl_ds.probing.report import MEAN, Matrix, ProbeReport


class Plot(NamedTuple):
    """A plot, and the sentence that explains it."""

    name: str
    title: str
    text: str


PLOTS = (
    Plot(
        "cka",
        "CKA(u, k) against block u",
        "How alike the output of block u stays to itself when linear probes take the place of blocks u+1 to k: linear "
        "CKA over all tokens, the paper's figure and the input of its rule.",
    ),
    Plot(
        "cka_true",
        "CKA(u, k) against block k",
        "How alike the chain of probes from block u is to what block k really puts out: linear CKA over all tokens.",
    ),
    Plot(
        "cka_unbiased",
        "unbiased CKA(u, k) against block u",
        "The first plot by the unbiased minibatch estimator, on a sample of tokens: where both differ, the sample "
        "is small or the tokens are few.",
    ),
    Plot(
        "cka_true_unbiased",
        "unbiased CKA(u, k) against block k",
        "The second plot by the unbiased minibatch estimator.",
    ),
    Plot(
        "error",
        "log10 error(u, v)",
        "How far the chain of probes from block u is from the true output of block v: squared distance over squared "
        "length, as a power of ten. ppcl plan gives up the spans of least total error.",
    ),
    Plot(
        "influence",
        "Block Influence",
        "How much each block turns its stream: 1 - cosine of input and output, mean over tokens; bars that are short "
        "belong to blocks that do little by themselves.",
    ),
)


def save_report(report: ProbeReport, folder: Path) -> None:
    """Write `report.json`, `heatmap.png`, a PNG a figure and `tensorboard/` into `folder`."""
    plots = {"heatmap": draw_overview(report)}
    plots |= {p.name: _draw(report, p) for p in PLOTS if p.name in report.figures.get(MEAN, {})}
    for name, png in plots.items():
        atomic_write(folder / f"{name}.png", png)
    with atomic_folder(folder / "tensorboard") as partial, SummaryWriter(str(partial)) as board:
        for name, png in plots.items():
            board.add_image(f"probe/{name}", np.array(Image.open(io.BytesIO(png)).convert("RGB")), dataformats="HWC")
    atomic_write(folder / "report.json", report.model_dump_json(indent=1))


def draw_overview(report: ProbeReport) -> bytes:
    """Similarity and error side by side, the paper's spans outlined, as a PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), constrained_layout=True)
    titles = ("Linear CKA(u, k): how alike block u's output and the chain to k stay", "log10 error(u, v) of the chain")
    for axis, name, title in zip(axes, ("cka", "error"), titles, strict=True):
        _heatmap(axis, getattr(report, name), name, title)
        _outline(axis, report)
    return as_png(figure)


def _draw(report: ProbeReport, plot: Plot) -> bytes:
    """One figure: the average over streams, each stream, and the spread of the average."""
    panels = list(_panels(report, plot))
    rows = -(-len(panels) // 2)
    figure, grid = plt.subplots(rows, 2, figsize=(11, 4.5 * rows), constrained_layout=True, squeeze=False)
    for axis, (title, matrix) in zip(grid.flat, panels, strict=False):
        if len(matrix) == 1:
            axis.bar(range(len(matrix[0])), _array(matrix)[0])
            axis.set(title=title, xlabel="block")
        else:
            _heatmap(axis, matrix, plot.name, title)
    for axis in grid.flat[len(panels) :]:
        axis.axis("off")
    return as_png(figure)


def _panels(report: ProbeReport, plot: Plot) -> Iterator[tuple[str, Matrix]]:
    yield f"{plot.title}, average", report.figures[MEAN][plot.name].value
    for stream, figures in report.figures.items():
        if stream != MEAN:
            yield f"{plot.title}, {stream}", figures[plot.name].value
    yield "spread of the average between the halves", report.figures[MEAN][plot.name].spread


def by_length(matrix: Matrix) -> Matrix:
    """The same with a row a length, `[length - 1][first block]`, down to the longest span that was measured."""
    blocks = len(matrix)
    rows = [[matrix[u][u + n] if u + n < blocks else None for u in range(blocks)] for n in range(blocks)]
    known = [n for n, row in enumerate(rows) if any(value is not None for value in row)]
    return rows[: max(known, default=0) + 1]


def _heatmap(axis: Axes, matrix: Matrix, name: str, title: str) -> None:
    values = _array(by_length(matrix))
    if name == "error":
        values = np.log10(np.where(values > 0, values, np.nan))
    edges = (-0.5, len(matrix) - 0.5, 0.5, len(values) + 0.5)
    cmap = "viridis_r" if name == "error" else "viridis"
    image = axis.imshow(values, cmap=cmap, origin="lower", aspect="auto", extent=edges)
    axis.set(title=title, xlabel="first block of the span", ylabel="blocks in the span")
    axis.title.set_fontsize(9)
    axis.figure.colorbar(image, ax=axis, shrink=0.8)


def _outline(axis: Axes, report: ProbeReport) -> None:
    for u, v in report.spans:
        style = "--" if (u, v) in report.unstable else "-"
        corner = (u - 0.5, v - u + 0.5)
        axis.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="red", linestyle=style))


def _array(matrix: Matrix) -> np.ndarray:
    return np.array(matrix, dtype=float)
