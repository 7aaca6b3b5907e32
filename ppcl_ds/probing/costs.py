"""What `ppcl probe` costs: passes over the teacher, arithmetic, memory of its sums; for `ppcl estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppcl_ds.probing.sums import HALVES, block_bytes, lanes_of, ranges, wanted_for
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import Probe
from ppcl_ds.teacher.anatomy import Anatomy, Capture

_WORTH_A_PART = 3600.0
"""Seconds of all processes of the topology: a part's file is written and read again, which may take minutes."""


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


def probing_costs(
    anatomy: Anatomy, capture: Capture, flops_until: Sequence[int], batch: int, section: Probe, room: int
) -> ProbingCosts:
    """Count what probing costs.

    Args:
        capture: every boundary of a forward; meta tensors will do.
        flops_until: FLOPs of that forward until each block has ended.
        batch: samples of that forward.
        room: bytes that sums and boundaries may fill, see `launch.room`.
    """
    lanes, span = lanes_of(anatomy, capture, []), section.max_span
    boundary = max(sum(stream.nbytes for stream in streams.values()) for streams in capture.streams.values())
    passes = ranges(lanes, span, section.blocks_at_once, room, boundary * section.batch_size // batch)
    samples = section.batches * section.batch_size
    wanted = [wanted_for(lanes, blocks, span) for blocks in passes]
    sizes = [sum(block_bytes(lanes, block, span) for block in blocks) for blocks in passes]
    exits = {
        (lane, block): capture.streams[anatomy.blocks[block].leaving][lane.stream]
        for lane in lanes
        for block in range(lane.start, lane.stop)
    }  # each (batch, S, C)
    held = [sum(stream.nbytes for (_, block), stream in exits.items() if block in each.exits) for each in wanted]
    moments = cubes = 0.0
    for (lane, block), stream in exits.items():
        window = min(span, lane.stop - block)
        moments += 2 * lane.channels**2 * window * stream.shape[1]
        # LU and its solution for each probe; five products a step of a chain: one of maps, four of covariances.
        cubes += HALVES * (8 / 3 + 10 * (window - 1)) * lane.channels**3
    return ProbingCosts(
        samples=samples,
        passes=len(passes),
        sums=max(sizes),
        boundaries=section.batch_size * max(held) // batch,
        part=sum(sizes),
        teacher_flops=samples / batch * sum(flops_until[each.last] for each in wanted),
        moment_flops=samples * moments,
        figure_flops=cubes,
    )


def worthwhile_parts(recipe: Recipe, costs: ProbingCosts, seconds: float) -> int:
    """Jobs that the probe is shared by on a cluster: as many as the recipe says, else one an hour of it.

    Args:
        seconds: that it takes on all processes of the topology.
    """
    if recipe.cluster.probe_parts is not None:
        return recipe.cluster.probe_parts
    return max(1, min(recipe.probe.batches, round(seconds / _WORTH_A_PART)))
