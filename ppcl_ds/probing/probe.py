"""`ppcl probe`: fit linear probes to every block and stream, then measure how far chains of them stray.

Two passes over different samples: one sums the normal equations, the other measures. All ranks run the sharded
teacher together on micro-batches of their own; the sums are added over ranks.
Shapes: B batch, S tokens, C channels, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ppcl_ds.console import track
from ppcl_ds.families.anatomy import Anatomy, Block, Capture
from ppcl_ds.probing.linear import NormalEquations, apply_probe, linear_cka
from ppcl_ds.probing.report import Matrix, ProbeReport, ppcl_spans
from ppcl_ds.units.loss import counted

Reading = tuple[Capture, Tensor | None]
"""What was recorded in one teacher forward, and the mask of its text tokens."""
Key = tuple[int, str]
"""A block (or the boundary behind it) and a stream."""


class Prober:
    """Probes of one teacher.

    Every rank constructs and uses it alike; after `fit` and `measure` every rank holds the same result.

    Args:
        unused: streams that leave the last block unread.
        ridge: relative ridge term.
    """

    def __init__(self, anatomy: Anatomy, unused: list[str], ridge: float, device: torch.device) -> None:
        self.anatomy, self.unused, self.ridge, self.device = anatomy, unused, ridge, device
        self.sums: dict[Key, NormalEquations] = {}
        self.probes: dict[Key, Tensor] = {}
        self.squared: dict[tuple[int, int, str], Tensor] = {}  # (u, v, stream) -> [squared error, squared norm]

    def _streams(self, block: Block) -> list[str]:
        return [s for s in block.returns if not (block.index == len(self.anatomy) - 1 and s in self.unused)]

    def _outputs(self, reading: Reading) -> Iterator[tuple[Block, str, Tensor, Tensor]]:
        """Block, stream, tokens entering and tokens leaving, (N, C) each, of one forward."""
        capture, mask = reading
        for block in self.anatomy.blocks:
            for stream in self._streams(block):
                if stream in capture.streams[block.leaving]:
                    yield (
                        block,
                        stream,
                        counted(capture.streams[block.entering][stream], mask if stream == "text" else None),
                        counted(capture.streams[block.leaving][stream], mask if stream == "text" else None),
                    )

    def fit(self, readings: Iterable[Reading], total: int) -> None:
        """Sum the normal equations over this rank's `total` readings, add up over ranks, solve."""
        for reading in track(readings, "fit linear probes", total):
            for block, stream, before, after in self._outputs(reading):
                key = (block.index, stream)
                if key not in self.sums:
                    self.sums[key] = NormalEquations(before.shape[1], self.device)
                self.sums[key].add(before, after)
        for key, sums in self.sums.items():
            dist.all_reduce(sums.gram)
            dist.all_reduce(sums.cross)
            self.probes[key] = sums.solve(self.ridge)

    def measure(self, readings: Iterable[Reading], total: int) -> None:
        """Sum squared errors of all chains over this rank's `total` readings, add up over ranks."""
        for reading in track(readings, "measure spans", total):
            leaving = {(block.index, stream): after for block, stream, _, after in self._outputs(reading)}
            for u, v, stream, chain in self._chains(leaving):
                true = leaving[v, stream].double()
                sums = torch.stack([(chain - true).square().sum(), true.square().sum()])
                self.squared[u, v, stream] = self.squared.get((u, v, stream), torch.zeros_like(sums)) + sums
        for sums in self.squared.values():
            dist.all_reduce(sums)

    def _chains(self, leaving: dict[Key, Tensor]) -> Iterator[tuple[int, int, str, Tensor]]:
        for (u, stream), tokens in leaving.items():
            chain = tokens
            for v in self._behind(self.anatomy.blocks[u]):
                if (v.index, stream) not in self.probes:
                    break
                chain = apply_probe(self.probes[v.index, stream], chain)
                yield u, v.index, stream, chain

    def _behind(self, u: Block) -> list[Block]:
        return [b for b in self.anatomy.blocks[u.index + 1 :] if b.list_name == u.list_name]

    def _cka_row(self, u: Block, stream: str) -> list[float]:
        """cka(u, u+1), cka(u, u+2), ... from the covariance of block u's output alone: the chain is linear in it."""
        behind = [b for b in self._behind(u) if (b.index, stream) in self.probes]
        if not behind:
            return []
        covariance = _covariance(self.sums[behind[0].index, stream].gram)
        chain = torch.eye(len(covariance), dtype=torch.float64, device=self.device)
        row = []
        for block in behind:
            chain = chain + chain @ self.probes[block.index, stream][:-1]
            cross = covariance @ chain
            row.append(linear_cka(covariance, cross, chain.T @ cross))
        return row

    def report(self, teacher: str) -> ProbeReport:
        """Matrices and spans, averaged over the streams that reach the end of a chain."""
        size = len(self.anatomy)
        cka: Matrix = [[None] * size for _ in range(size)]
        error: Matrix = [[None] * size for _ in range(size)]
        for u in self.anatomy.blocks:
            cka[u.index][u.index] = 1.0
            rows = [self._cka_row(u, stream) for stream in self._streams(u)]
            for step, v in enumerate(self._behind(u)):
                cka[u.index][v.index] = _mean([row[step] for row in rows if step < len(row)])
                pairs = [self.squared[key] for s in u.returns if (key := (u.index, v.index, s)) in self.squared]
                error[u.index][v.index] = _mean([float(pair[0] / pair[1]) for pair in pairs])
        lists: dict[str, list[int]] = {}
        for block in self.anatomy.blocks:
            lists.setdefault(block.list_name, []).append(block.index)
        tokens: dict[str, int] = {}
        for (_, stream), sums in self.sums.items():
            tokens[stream] = int(sums.gram[-1, -1])
        return ProbeReport(
            teacher=teacher,
            tokens=tokens,
            cka=cka,
            error=error,
            spans=ppcl_spans(cka, list(lists.values())),
            unused=self.unused,
        )


def _covariance(gram: Tensor) -> Tensor:
    """Centred second moments from the Gram matrix of `[h, 1]`, up to the number of tokens: (C, C)."""
    total, count = gram[-1, :-1], gram[-1, -1]
    return gram[:-1, :-1] - torch.outer(total, total) / count


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
