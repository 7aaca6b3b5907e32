"""What a probe found, as checked data: figures of every span by stream, their spread, and the paper's spans."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from ppcl_ds.errors import UserError
from ppcl_ds.probing.measure import MATRICES, Measured
from ppcl_ds.teacher.anatomy import Block

_ROUNDING = 1e-9
"""Differences of similarity below this are rounding, not acceleration."""

MEAN = "mean"
"""The stream that stands for the average of all."""

Matrix = list[list[float | None]]
"""Rows u, columns k or v; None outside one block list, left of the diagonal and beyond the longest span measured."""


class Figure(BaseModel):
    """One figure, measured twice: on each half of the samples by probes of the other half.

    Attributes:
        value: the mean of the two.
        spread: half their distance.
    """

    value: Matrix
    spread: Matrix


class ProbeReport(BaseModel):
    """The findings of `ppcl probe`.

    Attributes:
        teacher: class name.
        tokens: tokens that were summed, by stream; a probe is fitted on about half of them.
        cka: `cka[u][k]`: linear CKA over all tokens of the output of block u and of the chain "block u, then probes
            u+1..k", averaged over streams and halves. The paper's figure, and the input of its rule.
        error: `error[u][v]`: squared relative error of the chain "block u, then probes u+1..v" at block v's output,
            averaged over streams and halves; what `ppcl plan` adds up.
        spans: the paper's spans.
        unstable: those of `spans` that end elsewhere on either half.
        unused: streams that leave the last block and are read by nobody.
        figures: stream, or `mean` of the streams -> name -> figure. `cka` and `error` as above; `cka_true[u][k]`:
            linear CKA of the chain and of block k's true output; `cka_unbiased`, `cka_true_unbiased`: the same two by
            the unbiased minibatch estimator on sampled tokens; `influence`: one row, 1 - cosine of each block's input
            and output.
    """

    teacher: str
    tokens: dict[str, int]
    cka: Matrix
    error: Matrix
    spans: list[tuple[int, int]]
    unstable: list[tuple[int, int]] = []
    unused: list[str]
    figures: dict[str, dict[str, Figure]] = {}

    def used_streams(self, block: Block) -> tuple[str, ...]:
        """The streams leaving `block` that matter."""
        is_last = block.index == len(self.cka) - 1
        return tuple(stream for stream in block.returns if not (is_last and stream in self.unused))


def make_report(measured: Measured, teacher: str, unused: list[str], lists: Sequence[Sequence[int]]) -> ProbeReport:
    """Average over halves and streams, and apply the paper's rule.

    Args:
        measured: of all ranks.
        lists: block numbers of each run of blocks in which spans can lie.

    Raises:
        UserError: a figure is not finite.
    """
    streams = sorted({stream for _, stream in measured})
    figures: dict[str, dict[str, Figure]] = {}
    halves = {}
    for name in (*MATRICES, "influence"):
        by_stream = {stream: measured[name, stream] for stream in streams}
        mean = halves[name] = _mean(np.stack(list(by_stream.values())))
        for stream, values in (by_stream | {MEAN: mean}).items():
            figures.setdefault(stream, {})[name] = _figure(values.reshape(2, -1, values.shape[-1]))
    cka, error = figures[MEAN]["cka"].value, figures[MEAN]["error"].value
    for block in (block for blocks in lists for block in blocks[:-1]):
        if cka[block][block + 1] is None or error[block][block + 1] is None:
            raise UserError(
                f"the figures of block {block + 1} are not finite, and no plan can be made of them; run the teacher "
                "in another teacher.precision (fp16 overflows where bf16 and fp32 do not)"
            )
    spans = ppcl_spans(cka, lists)
    ends = {blocks[0]: blocks[-1] for blocks in lists}
    last = {u: end for first, end in ends.items() for u in range(first, end + 1)}
    unstable = [
        (u, v) for u, v in spans if any(span_end(half[u, u : last[u] + 1].tolist(), u) != v for half in halves["cka"])
    ]
    return ProbeReport(
        teacher=teacher,
        tokens={stream: round(np.nanmax(measured["tokens", stream].sum(0))) for stream in streams},
        cka=cka,
        error=error,
        spans=spans,
        unstable=unstable,
        unused=unused,
        figures=figures,
    )


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing at all, the mean is NaN, as it should be
        return np.nanmean(values, axis=0)


def _figure(halves: np.ndarray) -> Figure:
    return Figure(value=_matrix(_mean(halves)), spread=_matrix(np.abs(halves[0] - halves[1]) / 2))


def _matrix(values: np.ndarray) -> Matrix:
    return [[value if np.isfinite(value) else None for value in row] for row in values.tolist()]


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


def span_end(row: Sequence[float | None], u: int) -> int:
    """Where the paper's span that starts at u ends (arXiv 2511.16156).

    With `delta(u, k) = cka(u, k-1) - cka(u, k)`, it ends at the first `v = k - 1 > u` with
    `delta(u, k) > delta(u, k - 1)`: where the loss of similarity starts to accelerate; else where the row ends.

    Args:
        row: cka(u, u), cka(u, u+1), ...; it ends at the end of the list, or before a number that is missing.
    """
    known = np.array(row, dtype=float)
    missing = np.flatnonzero(np.isnan(known))
    known = known[: missing[0]] if len(missing) else known
    delta = -np.diff(known)  # delta(u, u+1), delta(u, u+2), ...
    accelerates = np.flatnonzero(np.diff(delta) > _ROUNDING)  # at k = u + 2 + i
    return u + 1 + int(accelerates[0]) if len(accelerates) else u + max(0, len(known) - 1)


def ppcl_spans(cka: Matrix, lists: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The paper's spans: each ends where `span_end` says, the next one starts after it.

    Args:
        lists: block numbers of each run of blocks in which spans can lie.
    """
    spans = []
    for blocks in lists:
        u, end = blocks[0], blocks[-1]
        while u < end:
            v = span_end(cka[u][u : end + 1], u)
            if v > u:
                spans.append((u, v))
            u = v + 1
    return spans
