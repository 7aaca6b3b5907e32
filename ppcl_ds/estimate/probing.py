"""What `ppcl probe` will need: memory of its sums, passes over the teacher, arithmetic and time."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ppcl_ds.estimate.accelerators import Accelerator
from ppcl_ds.probing.sums import HALVES, SUMS_BYTES, Lane, block_bytes, lanes_of, ranges, wanted_for
from ppcl_ds.sections import Probe
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.meta_forward import Rehearsal, rehearse


class Probing(BaseModel):
    """The work of `ppcl probe`, over all processes, and its memory on each.

    Streams that nobody reads are found by a real forward, so they count here: one block's text too many, at most.

    Attributes:
        samples: calibration samples.
        passes: times that the teacher reads them.
        sums: bytes of the sums of the largest range of blocks.
        boundaries: most bytes of boundaries that are held of one micro-batch.
        part: bytes of the file that each `--part` writes.
        teacher_flops: of all passes; each ends behind the last boundary that it wants.
        moment_flops: of the second moments, float64.
        figure_flops: of probes and chains, float64.
        seconds: all of it on the cluster, communication left out.
    """

    model_config = ConfigDict(frozen=True)

    samples: int
    passes: int
    sums: int
    boundaries: int
    part: int
    teacher_flops: float
    moment_flops: float
    figure_flops: float
    seconds: float


def probing_of(
    teacher: Teacher,
    section: Probe,
    latents: tuple[int, int, int],
    text_tokens: int,
    *,
    world: int,
    accelerator: Accelerator,
    utilisation: float,
) -> Probing:
    """Count what probing costs; no weights are needed.

    Args:
        latents: (C, H, W) of a sample.
        text_tokens: tokens of its prompt.
        world: processes.
        utilisation: share of the accelerator's peaks, bf16 and float64, that matrix products reach.
    """
    rehearsal = rehearse(teacher, latents, text_tokens)
    lanes, span = lanes_of(teacher.anatomy, rehearsal.capture, []), section.max_span
    passes = ranges(lanes, span, section.blocks_at_once, SUMS_BYTES)
    samples = section.batches * section.batch_size
    wanted = [wanted_for(lanes, blocks, span) for blocks in passes]
    forwards = samples * sum(rehearsal.flops_until[each.last] for each in wanted)
    sizes = [sum(block_bytes(lanes, block, span) for block in blocks) for blocks in passes]
    moments = samples * sum(
        2 * lane.channels**2 * window * _exit(rehearsal, teacher.anatomy, lane, block).shape[1]
        for lane, block, window in _windows(lanes, span)
    )
    # LU and its solution for each probe; five products a step of a chain: one of maps, four of covariances.
    cubes = sum(HALVES * (8 / 3 + 10 * (window - 1)) * lane.channels**3 for lane, _, window in _windows(lanes, span))
    rate = world * utilisation * 1e12
    return Probing(
        samples=samples,
        passes=len(passes),
        sums=max(sizes),
        boundaries=section.batch_size * max(_held(rehearsal, teacher.anatomy, lanes, each.exits) for each in wanted),
        part=sum(sizes),
        teacher_flops=forwards,
        moment_flops=moments,
        figure_flops=cubes,
        seconds=forwards / (rate * accelerator.tflops) + (moments + cubes) / (rate * accelerator.tflops64),
    )


def _windows(lanes: Sequence[Lane], span: int) -> list[tuple[Lane, int, int]]:
    """Lane, block, and exits in the window that begins there."""
    return [(lane, block, min(span, lane.stop - block)) for lane in lanes for block in range(lane.start, lane.stop)]


def _exit(rehearsal: Rehearsal, anatomy: Anatomy, lane: Lane, block: int) -> Tensor:
    return rehearsal.capture.streams[anatomy.blocks[block].leaving][lane.stream]


def _held(rehearsal: Rehearsal, anatomy: Anatomy, lanes: Sequence[Lane], exits: frozenset[int]) -> int:
    return sum(
        _exit(rehearsal, anatomy, lane, block).nbytes
        for lane in lanes
        for block in exits
        if lane.start <= block < lane.stop
    )
