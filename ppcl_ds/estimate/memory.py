"""Memory of a process by part: what is always there, and what comes on top at each moment of a step.

Every number counts tensors. The driver's context, NCCL's buffers, what kernels allocate inside and the gaps between
allocations are not seen; the share of the memory that is left alone stands for them (`accelerators.RESERVED`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from ppcl_ds.estimate.layout import Layout
from ppcl_ds.estimate.measured import Measured
from ppcl_ds.estimate.settings import Settings

Parts = dict[str, int]
"""Part -> bytes."""


class Memory(BaseModel):
    """Memory of a process of one stage, in bytes.

    Attributes:
        stage: its stage.
        resident: parts that are there all the time.
        moments: moment of a step -> parts on top.
        worst: the moment that takes most.
        peak: resident parts and those of the worst moment.
    """

    model_config = ConfigDict(frozen=True)

    stage: int
    resident: Parts
    moments: dict[str, Parts]
    worst: str
    peak: int


def memory_of(stage: int, units: Sequence[Sequence[str]], layout: Layout, run: Measured, settings: Settings) -> Memory:
    """Memory of a process of `stage`.

    Args:
        units: for each stage, the names of its units.
    """
    resident = teacher_memory(layout, run, settings) | _library(units[stage], layout, run, settings)
    return memory_with(stage, resident, _moments(stage, units, layout, run, settings))


def memory_with(stage: int, resident: Parts, moments: dict[str, Parts]) -> Memory:
    """The account of a process of `stage`: its worst moment and its peak."""
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    peak = sum(resident.values()) + sum(moments[worst].values())
    return Memory(stage=stage, resident=resident, moments=moments, worst=worst, peak=peak)


def partition_bytes(parameters: Iterable[tuple[int, int]], ranks: int) -> int:
    """One rank's part of a model under ZeRO-3: every parameter is cut into equal parts, the last one padded.

    Args:
        parameters: elements and bytes of an element, for each parameter.
    """
    return sum(-(-elements // ranks) * size for elements, size in parameters)


def teacher_memory(layout: Layout, run: Measured, settings: Settings) -> Parts:
    """The partition over all ranks; the one inside the node, if any; and what every rank has whole."""
    small = sum(n * size for n, size in run.parameters if n <= settings.persistent) if layout.world > 1 else 0
    copy = partition_bytes(run.parameters, settings.ranks_per_copy) if settings.secondary(layout) else 0
    return {
        "teacher partition": partition_bytes(run.parameters, layout.world),
        "teacher copy in the node": copy,
        "teacher small tensors": small + run.buffers,
    }


def _library(units: Sequence[str], layout: Layout, run: Measured, settings: Settings) -> Parts:
    """Units in the number format of the run and the float32 sums of their gradients, both whole on each replica; a
    float32 master and two moments, 12 bytes a parameter, divided over the replicas.
    """
    parameters = sum(run.unit_parameters[name] for name in units)
    return {
        "units": parameters * run.element,
        "gradients": parameters * 4,
        "optimizer": 0 if settings.offload else -(-parameters // layout.replicas) * 12,
    }


def _moments(
    stage: int, units: Sequence[Sequence[str]], layout: Layout, run: Measured, settings: Settings
) -> dict[str, Parts]:
    """What comes on top, moment by moment.

    - Teacher forward: the block at work, the boundaries that were recorded for units, and gathered parameters: those of
      the largest block, and with them either the buffer that they arrived in or what was fetched ahead.
    - Exchange (more than one stage): the boundaries; the message to other stages; and what arrives from them.
    - Unit training: what the stage's units read, of every micro-batch of the round, with the message that may still be
      under way; the activations of one unit, as each unit's backward follows its forward; and, in float32, the gradient
      of one parameter that is being added to its sum.
    """
    own, others = units[stage], [names for other, names in enumerate(units) if other != stage]
    recorded = run.held(name for names in units for name in names)
    outgoing, incoming = sum(map(run.message, others)), len(others) * run.message(own)
    parcels = run.held(own) + incoming
    moments: dict[str, Parts] = {
        "teacher forward": {
            "gathered block": gathered_memory(layout, run, settings),
            "boundaries for units": recorded,
            "activations": run.teacher_activations,
        }
    }
    if others:
        moments["exchange"] = {"boundaries for units": recorded, "outgoing": outgoing, "incoming": incoming}
    activations = max(run.activations[name] for name in own)
    summed = run.largest_parameter * 4 if run.element < 4 else 0
    moments["unit training"] = {
        "parcels": parcels,
        "outgoing": outgoing,
        "activations": activations,
        "gradient on its way to its sum": summed,
    }
    return moments


def gathered_memory(layout: Layout, run: Measured, settings: Settings) -> int:
    """Parameters that are whole for a moment in the teacher's forward."""
    if layout.world == 1:
        return 0
    behind_it = sum(elements for elements, _ in run.used) - run.largest_block
    ahead = max(0, min(settings.prefetch, settings.max_live - run.largest_block, behind_it))
    return (run.largest_block + max(run.largest_block, ahead)) * run.element
