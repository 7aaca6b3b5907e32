"""The arithmetic of a training step, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

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

    def per_step(self, samples: int, checkpointing: bool) -> float:
        """FLOPs of one optimizer step, over all ranks.

        Args:
            samples: the global batch.
            checkpointing: whether units compute their activations again in the backward pass.
        """
        return samples * (self.teacher + sum(self.units.values()) * unit_passes(checkpointing))


def unit_passes(checkpointing: bool) -> int:
    """How many forwards' worth of FLOPs a unit's training costs: forward 1, backward 2, recomputation 1."""
    return 4 if checkpointing else 3


def measure_work(teacher: Teacher, plan: Plan, latents: tuple[int, int, int], text_tokens: int) -> Work:
    """Count the FLOPs of one sample; no weights are needed.

    Args:
        latents: (C, H, W) of a sample.
        text_tokens: tokens of its prompt.

    Raises:
        UserError: the teacher cannot read samples of this shape.
    """
    taps = taps_of(plan, teacher.anatomy).parts
    return work_of(meta_forward(teacher, latents, text_tokens, taps=taps), plan, batch=1)


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
