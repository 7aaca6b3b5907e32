"""The arithmetic of a training step, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from ppcl_ds.data.batch import Size
from ppcl_ds.sampling import Trajectories
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.meta_forward import MetaForward, meta_forward
from ppcl_ds.units.kinds import batches_of, empty_unit, taps_of
from ppcl_ds.units.plan import Plan, UnitPlan


@dataclass(frozen=True)
class Work:
    """FLOPs of one sample: matrix products, convolutions and attention, a multiplication and an addition as two.

    What is computed element by element (norms, activations, the loss, the optimizer) does not count.

    Attributes:
        teacher: the teacher's forward, up to the last block that a unit needs.
        units: unit name -> its forward.
    """

    teacher: float
    units: dict[str, float]

    def per_step(self, samples: int, checkpointing: bool, uses: int = 1) -> float:
        """FLOPs of one optimizer step, over all ranks; a mean, where not every step reads the teacher.

        Args:
            samples: the global batch.
            checkpointing: whether units compute their activations again in the backward pass.
            uses: steps for each reading of the teacher.
        """
        return samples * (self.teacher / uses + sum(self.units.values()) * unit_passes(checkpointing))


def unit_passes(checkpointing: bool) -> int:
    """How many forwards' worth of FLOPs a unit's training costs: forward 1, backward 2, recomputation 1."""
    return 4 if checkpointing else 3


def measure_work(teacher: Teacher, plan: Plan, size: Size, trajectories: Trajectories | None = None) -> Work:
    """Count the FLOPs of one sample; no weights are needed.

    Args:
        trajectories: on which the teacher runs to its end.

    Raises:
        UserError: the teacher cannot read samples of this size.
    """
    taps = taps_of(plan, teacher.anatomy).parts
    forward = meta_forward(teacher, size, taps=taps)
    work = work_of(forward, plan, batch=1)
    if trajectories is None:
        return work
    return replace(work, teacher=forward.flops_until[len(teacher.blocks) - 1] * trajectories.forwards)


def work_of(forward: MetaForward, plan: Plan, batch: int) -> Work:
    """The work of one sample, from a forward with `batch` of them in which the plan's taps were recorded."""
    last = taps_of(plan, forward.teacher.anatomy).last
    return Work(
        teacher=forward.flops_until[last] / batch,
        units={unit.name: _unit_flops(unit, forward) / batch for unit in plan.units},
    )


def _unit_flops(unit: UnitPlan, forward: MetaForward) -> float:
    """FLOPs of a unit's forward, all samples of the forward."""
    if unit.takes_blocks:
        return forward.block_flops[unit.span[0]]
    plan = Plan(teacher="", blocks=len(forward.teacher.blocks), units=(unit,), variants={})
    [batch] = batches_of(forward.capture, None, plan, forward.teacher.anatomy).values()
    module = empty_unit(unit, forward.teacher, torch.float32)
    inputs = {name: tensor.float() for name, tensor in batch.inputs.items()}
    with FlopCounterMode(display=False) as counter:
        module(inputs, batch.conditioning)
    return counter.get_total_flops()
