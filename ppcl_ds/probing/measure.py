"""Every figure of a probe, from sums alone: probes are fitted on one half of the samples and measured on the other.

The chain "block u, then probes u + 1, ..., v" is one affine map of block u's output, so its distance from block v's
output is a sum over second moments. Blocks are visited from the last to the first: what a chain needs of the blocks
after u is small or has been solved by then, and their moments are gone.
Shapes: C channels, M blocks, K minibatches of at most S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ppcl_ds.probing.linear import Affine, Moments, centred, fit_probe
from ppcl_ds.probing.similarity import Minibatches, linear_cka
from ppcl_ds.probing.sums import HALVES, BlockSums, Key, Lane, Sums

MATRICES = ("cka", "cka_true", "cka_unbiased", "cka_true_unbiased", "error")
"""Figures of a span: rows u, columns the chain's last block."""
VECTORS = ("influence", "tokens")
"""Figures of a block; `tokens` counts those that were summed."""

Measured = dict[tuple[str, str], np.ndarray]
"""(figure, stream) -> (2, M, M) or (2, M): on each half; NaN where it is not defined or was not measured here."""


@dataclass
class _Exit:
    """What is kept of a block's exit for the chains that begin before it.

    Attributes:
        sums: without their moments.
        energy: (2,) sums of |h|^2.
        norm, trace: of the covariance on each half.
        minibatches: sampled tokens of each half.
        probes: of this block, one fitted on each half; set when the block before it is visited.
    """

    sums: BlockSums
    energy: Tensor
    norm: list[float]
    trace: list[float]
    minibatches: list[Minibatches]
    probes: list[Affine] = field(default_factory=list)


def measure(
    lanes: Sequence[Lane], ranges: Iterable[Sums], blocks: int, ridge: float, mine: Callable[[int], bool]
) -> Measured:
    """All figures.

    Args:
        ranges: sums of ranges of blocks, the last range first; emptied as they are used.
        blocks: M.
        ridge: of the probes, see `fit_probe`.
        mine: whether this rank measures the spans that begin at a block (probes are solved by all).
    """
    of = {lane.stream: lane for lane in lanes}  # replaced list by list
    found: Measured = {}
    for lane in lanes:
        for name in MATRICES:
            found.setdefault((name, lane.stream), np.full((HALVES, blocks, blocks), np.nan))
        for name in VECTORS:
            found.setdefault((name, lane.stream), np.full((HALVES, blocks), np.nan))
    ahead: dict[str, list[_Exit]] = {}
    for sums in ranges:
        for key in sorted(sums, reverse=True):
            own = sums.pop(key)
            of[key.stream] = next(x for x in lanes if x.stream == key.stream and x.start <= key.block < x.stop)
            if key.block == of[key.stream].stop - 1:
                ahead[key.stream] = []
            window = ahead[key.stream][: own.moments.shape[1] - 1]
            _visit(found, key, own, window, ridge, mine(key.block))
            ahead[key.stream] = [_exit_of(own), *window]
    return found


def _visit(found: Measured, key: Key, own: BlockSums, ahead: Sequence[_Exit], ridge: float, mine: bool) -> None:
    u, stream = key
    found["tokens", stream][:, u] = own.tokens.tolist()
    found["influence", stream][:, u] = (1 - own.cosines / own.tokens).tolist()
    if ahead:
        following = ahead[0].sums
        ahead[0].probes = [
            fit_probe(
                Moments(
                    own.moments[half, 0],
                    own.moments[half, 1],
                    own.totals[half],
                    following.totals[half],
                    float(own.tokens[half]),
                ),
                ridge,
            )
            for half in range(HALVES)
        ]
    if not mine:
        return
    for half in range(HALVES):
        for name in MATRICES[:-1]:
            found[name, stream][half, u, u] = 1.0
        for step, figures in enumerate(_chain(own, ahead, half), 1):
            for name, value in figures.items():
                found[name, stream][half, u, u + step] = value


def _chain(own: BlockSums, ahead: Sequence[_Exit], half: int) -> Iterable[Mapping[str, float]]:
    """Figures of the chains from one block to each block ahead, on one half, by the probes of the other.

    With W, b the chain's map, S_uv covariances and m means: the mean square of the distance is
    `tr W^T S_uu W - 2 tr W^T S_uv + tr S_vv + |m_u W + b - m_v|^2`.
    """
    count, total = float(own.tokens[half]), own.totals[half]
    covariance = centred(own.moments[half, 0], total, total, count)
    start = _minibatches(own, half)
    chain: Affine | None = None
    for step, end in enumerate(ahead, 1):
        probe = end.probes[1 - half]
        chain = probe if chain is None else chain.then(probe)
        with_start = covariance @ chain.weight  # X^T Y, with Y the chain's output
        with_itself = chain.weight.T @ with_start
        end_total = end.sums.totals[half]
        start_end = centred(own.moments[half, step], total, end_total, count)
        with_end = chain.weight.T @ start_end
        shift = (total @ chain.weight - end_total) / count + chain.bias
        square = with_itself.trace() - 2 * with_end.trace() + end.trace[half] + count * shift.square().sum()
        output = Minibatches(chain(own.sample[half::HALVES]), own.sampled[half::HALVES])
        yield {
            "cka": linear_cka(covariance, with_start, with_itself),
            "cka_true": float(with_end.square().sum() / (with_itself.norm() * end.norm[half])),
            "cka_unbiased": start.cka(output),
            "cka_true_unbiased": end.minibatches[half].cka(output),
            # Rounding can leave a chain without error a little below zero.
            "error": max(0.0, float(square / end.energy[half])),
        }


def _exit_of(own: BlockSums) -> _Exit:
    """What later visits need of a block; its moments go."""
    covariances = [
        centred(own.moments[half, 0], own.totals[half], own.totals[half], float(own.tokens[half]))
        for half in range(HALVES)
    ]
    end = _Exit(
        sums=own,
        energy=own.moments[:, 0].diagonal(dim1=-2, dim2=-1).sum(-1),
        norm=[float(covariance.norm()) for covariance in covariances],
        trace=[float(covariance.trace()) for covariance in covariances],
        minibatches=[_minibatches(own, half) for half in range(HALVES)],
    )
    own.moments = torch.empty(0)
    return end


def _minibatches(own: BlockSums, half: int) -> Minibatches:
    return Minibatches(own.sample[half::HALVES], own.sampled[half::HALVES])


def together(parts: Sequence[Measured]) -> Measured:
    """What several ranks measured, each its own rows, as one."""
    return {key: np.where(np.isnan(own), _other(parts, key), own) for key, own in parts[0].items()}


def _other(parts: Sequence[Measured], key: tuple[str, str]) -> np.ndarray:
    found = parts[0][key]
    for part in parts[1:]:
        found = np.where(np.isnan(found), part[key], found)
    return found
