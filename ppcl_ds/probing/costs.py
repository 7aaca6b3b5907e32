"""What `ppcl probe` costs: passes over the teacher, arithmetic, memory of its sums; for `ppcl estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ppcl_ds.probing.sums import HALVES, SUMS_BYTES, Lane, block_bytes, lanes_of, ranges, wanted_for
from ppcl_ds.sections import Probe
from ppcl_ds.training.meta_forward import MetaForward


@dataclass(frozen=True)
class ProbingCosts:
    """The work of `ppcl probe`, over all processes, and its memory on each.

    Streams that nobody reads are found by a real forward, so they count here: one block's text too many, at most.

    Attributes:
        samples: calibration samples.
        passes: times that the teacher reads them.
        sums: bytes of the sums of the largest range of blocks.
        boundaries: most bytes of boundaries that are held of one micro-batch.
        part: bytes of the file that each `--part` writes.
        teacher_flops: of all passes; each ends after the last boundary that it wants.
        moment_flops: of the second moments, float64.
        figure_flops: of probes and chains, float64.
    """

    samples: int
    passes: int
    sums: int
    boundaries: int
    part: int
    teacher_flops: float
    moment_flops: float
    figure_flops: float


def probing_costs(forward: MetaForward, section: Probe) -> ProbingCosts:
    """Count what probing costs.

    Args:
        forward: of one sample.
    """
    lanes, span = lanes_of(forward.teacher.anatomy, forward.capture, []), section.max_span
    passes = ranges(lanes, span, section.blocks_at_once, SUMS_BYTES)
    samples = section.batches * section.batch_size
    wanted = [wanted_for(lanes, blocks, span) for blocks in passes]
    sizes = [sum(block_bytes(lanes, block, span) for block in blocks) for blocks in passes]
    windows = _windows(lanes, span)
    # LU and its solution for each probe; five products a step of a chain: one of maps, four of covariances.
    cubes = sum(HALVES * (8 / 3 + 10 * (window - 1)) * lane.channels**3 for lane, _, window in windows)
    return ProbingCosts(
        samples=samples,
        passes=len(passes),
        sums=max(sizes),
        boundaries=section.batch_size * max(_held(forward, lanes, each.exits) for each in wanted),
        part=sum(sizes),
        teacher_flops=samples * sum(forward.flops_until[each.last] for each in wanted),
        moment_flops=samples
        * sum(2 * lane.channels**2 * window * _exit(forward, lane, block).shape[1] for lane, block, window in windows),
        figure_flops=cubes,
    )


def _windows(lanes: Sequence[Lane], span: int) -> list[tuple[Lane, int, int]]:
    """Lane, block, and exits in the window that begins there."""
    return [(lane, block, min(span, lane.stop - block)) for lane in lanes for block in range(lane.start, lane.stop)]


def _exit(forward: MetaForward, lane: Lane, block: int) -> Tensor:
    return forward.capture.streams[forward.teacher.blocks[block].leaving][lane.stream]


def _held(forward: MetaForward, lanes: Sequence[Lane], exits: frozenset[int]) -> int:
    return sum(
        _exit(forward, lane, block).nbytes for lane in lanes for block in exits if lane.start <= block < lane.stop
    )
