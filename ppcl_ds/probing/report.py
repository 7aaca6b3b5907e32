"""What a probe found: spans, similarity and error matrices, as JSON and as heatmaps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from pydantic import BaseModel, ValidationError

from ppcl_ds.errors import UserError
from ppcl_ds.families.anatomy import Block
from ppcl_ds.whole import write_whole

_ROUNDING = 1e-9
"""Differences of similarity below this are rounding, not acceleration."""

Matrix = list[list[float | None]]
"""Rows u, columns k or v; None outside one block list and left of the diagonal."""


class ProbeReport(BaseModel):
    """The findings of `ppcl probe`, averaged over streams.

    Attributes:
        teacher: class name.
        tokens: tokens that the probes were fitted on, by stream.
        cka: `cka[u][k]`: linear CKA of the output of block u and of "block u, then probes u+1..k".
        error: `error[u][v]`: squared relative error of the chain "block u, then probes u+1..v" at block v's output.
        spans: the paper's spans.
        unused: streams that leave the last block and are read by nobody.
    """

    teacher: str
    tokens: dict[str, int]
    cka: Matrix
    error: Matrix
    spans: list[tuple[int, int]]
    unused: list[str]

    def used_streams(self, block: Block) -> tuple[Literal["image", "text"], ...]:
        """The streams leaving `block` that matter."""
        is_last = block.index == len(self.cka) - 1
        return tuple(s for s in ("image", "text") if s in block.returns and not (is_last and s in self.unused))

    def save(self, folder: Path) -> None:
        """Write `report.json` and `heatmap.png` into `folder`."""
        write_whole(folder / "heatmap.png", draw_heatmaps(self))
        write_whole(folder / "report.json", self.model_dump_json(indent=1))


def load_report(folder: Path) -> ProbeReport:
    """Read a probe report.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return ProbeReport.model_validate_json((folder / "report.json").read_text())
    except OSError:
        raise UserError(f"probe report {folder}/report.json: not found; make it with `ppcl probe`") from None
    except ValidationError as fault:
        raise UserError(
            f"probe report {folder}/report.json: {fault.errors()[0]['msg']}; run `ppcl probe` again"
        ) from None


def ppcl_spans(cka: Matrix, lists: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The paper's spans (arXiv 2511.16156): each ends where the loss of similarity starts to accelerate.

    With `delta(u, k) = cka(u, k-1) - cka(u, k)`, the span that starts at u ends at the first `v = k - 1 > u` with
    `delta(u, k) > delta(u, k - 1)`, or at the end of its list; the next one starts behind it.

    Args:
        lists: block numbers of each block list.
    """
    spans = []
    for blocks in lists:
        u, end = blocks[0], blocks[-1]
        while u < end:
            row = np.array(cka[u][u : end + 1], dtype=float)  # cka(u, u), cka(u, u+1), ...
            delta = -np.diff(row)  # delta(u, u+1), delta(u, u+2), ...
            accelerates = np.flatnonzero(np.diff(delta) > _ROUNDING)  # at k = u + 2 + i
            v = u + 1 + int(accelerates[0]) if len(accelerates) else end
            spans.append((u, v))
            u = v + 1
    return spans


def draw_heatmaps(report: ProbeReport) -> bytes:
    """Similarity and error side by side, the paper's spans outlined, as a PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), constrained_layout=True)
    titles = ("Linear CKA(u, k): how alike block u's output and the chain to k stay", "log10 error(u, v) of the chain")
    for axis, matrix, title in zip(axes, (report.cka, report.error), titles, strict=True):
        values = np.array(matrix, dtype=float)
        if matrix is report.error:
            values = np.log10(np.where(values > 0, values, np.nan))
        image = axis.imshow(values, cmap="viridis" if matrix is report.cka else "magma")
        for u, v in report.spans:
            axis.add_patch(plt.Rectangle((u - 0.5, u - 0.5), v - u + 1, v - u + 1, fill=False, edgecolor="red"))
        axis.set(title=title, xlabel="last block of the span", ylabel="first block u")
        axis.title.set_fontsize(9)
        figure.colorbar(image, ax=axis, shrink=0.8)
    return as_png(figure)


def as_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
