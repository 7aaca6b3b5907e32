"""The library: all units of a run as one DeepSpeed pipeline module, laid over the stages by cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ppcl_ds.teacher.flows import IMAGE
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.engine import Students
from ppcl_ds.training.log import Means
from ppcl_ds.units.compiled import Compiled
from ppcl_ds.units.kinds import build_unit
from ppcl_ds.units.loss import boundary_loss, branch_loss, norm_ratio
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.units.unit import UnitBatch


class UnitLayer(nn.Module):
    """One unit as a layer of the pipeline module, which lays the units over the stages. Nothing passes between layers.

    Args:
        plan: what it takes the place of.
        checkpointing: recompute activations in the backward pass, see `recompute_parts`.
        compiles: run its block and its loss under torch.compile.
    """

    def __init__(
        self,
        plan: UnitPlan,
        teacher: Teacher,
        dtype: torch.dtype,
        magnitude_weight: float,
        branch_weight: float,
        checkpointing: bool,
        compiles: bool,
    ) -> None:
        super().__init__()
        self.plan, self.magnitude_weight, self.branch_weight = plan, magnitude_weight, branch_weight
        self.unit = build_unit(plan, teacher, dtype).requires_grad_(True).eval()
        if checkpointing:
            self.unit.recompute()
        self.judge: Callable[..., tuple[Tensor, Tensor]] = _judge
        if compiles:
            self.unit.compile_block()
            self.judge = Compiled(_judge, "the units' loss")
        self._means = Means()

    @property
    def name(self) -> str:
        return self.plan.name

    def loss(self, batch: UnitBatch) -> Tensor:
        """How far the unit is from the teacher on a micro-batch, summed over its outputs: (), float32."""
        outputs = self.unit(batch.inputs, batch.conditioning)
        measured: dict[str, Tensor] = {}
        for name in self.plan.outputs:
            student, teacher, mask = outputs[name], batch.targets[name], batch.mask_of(name)
            loss, ratio = self.judge(student, teacher, mask, self.magnitude_weight, batch.weights)
            measured |= {f"loss/{name}": loss, f"norm_ratio/{name}": ratio}
            if name == IMAGE and batch.twins is not None:
                measured["loss/branches"] = self.branch_weight * branch_loss(student, teacher, batch.twins)
        self._means.add(measured)
        losses = [value for name, value in measured.items() if name.startswith("loss/")]
        return torch.stack(losses).sum()

    def drain(self) -> dict[str, float]:
        """Means of loss and norm ratio by output since the last call; `unit/loss/output` -> value."""
        return {f"{self.name}/{name}": mean for name, mean in self._means.drain().items()}


def _judge(
    student: Tensor, teacher: Tensor, mask: Tensor | None, magnitude_weight: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and norm ratio of a unit's output, see `boundary_loss`."""
    loss = boundary_loss(student, teacher, mask, magnitude_weight, weights)
    return loss, norm_ratio(student.detach(), teacher, mask)


class Library(Students):
    """All units of a plan over the pipeline stages; each rank builds only its stage's units.

    Every rank must construct it. Afterwards `stage_units` says which stage holds which units, on every rank.

    Args:
        costs: unit name -> what it costs to train, in any unit; the stages get neighbours of about equal cost.
    """

    def __init__(
        self,
        plan: Plan,
        teacher: Teacher,
        *,
        costs: Mapping[str, float],
        stages: int,
        dtype: torch.dtype,
        magnitude_weight: float,
        checkpointing: bool,
        branch_weight: float = 0.0,
        compiles: bool = False,
    ) -> None:
        shared = (teacher, dtype, magnitude_weight, branch_weight, checkpointing, compiles)
        specs = [LayerSpec(UnitLayer, unit, *shared) for unit in plan.units]
        super().__init__(specs, [int(costs[unit.name]) for unit in plan.units], stages)
        names = [unit.name for unit in plan.units]
        self.stage_units = [names[a:b] for a, b in zip(self.parts, self.parts[1:], strict=False)]

    @property
    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return {layer.name: dict(layer.unit.core.named_parameters()) for layer in self.layers}

    @property
    def layers(self) -> list[UnitLayer]:
        return list(self.forward_funcs)

    def drain(self) -> dict[str, float]:
        """Means over this stage's units since the last call, see `UnitLayer.drain`."""
        return {name: mean for layer in self.layers for name, mean in layer.drain().items()}
