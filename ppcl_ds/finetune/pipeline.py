"""A variant as DeepSpeed's pipeline: real activations between the stages, the stock 1F1B schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from torch import Tensor, nn

from ppcl_ds.data.batch import Size
from ppcl_ds.finetune.stage import Stage, stage_batch
from ppcl_ds.finetune.trainable import IDLE, REST, Part
from ppcl_ds.sections import Finetune, Precision
from ppcl_ds.teacher.pipeline_call import Arguments
from ppcl_ds.training.engine import Students, StudentsEngine
from ppcl_ds.training.optimizer import WholeOptimizer
from ppcl_ds.units.variant import Layout


class Variant(Students):
    """All of a variant's blocks over the pipeline stages; what belongs to no block is on every stage.

    Every rank must construct it; each builds and reads its own stage.

    Args:
        bounds: first block of each stage, and the number of blocks.
        parts: what is trained, on all stages.
        kept_lr: learning rate of parts that were the teacher's, as a multiple of the units'.
        stage: the other arguments of `Stage`.
    """

    def __init__(
        self, bounds: Sequence[int], layout: Layout, parts: Sequence[Part], kept_lr: float, **stage: Any
    ) -> None:
        self.kept = {part.name for part in parts if part.kept}
        self.kept_lr = kept_lr
        stages = len(bounds) - 1
        layers = [LayerSpec(Stage, number, bounds, layout, parts, **stage) for number in range(stages)]
        super().__init__(layers, [1] * stages, stages, dynamic_shape=True)

    @property
    def stage(self) -> Stage:
        [stage] = self.forward_funcs
        return stage

    @property
    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        return self.stage.parts

    @property
    def copies(self) -> frozenset[str]:
        """What belongs to no block, everywhere but on the first stage; and what stands for nothing."""
        return frozenset(name for name in self.trained if (_everywhere(name) and self.stage_id) or name == IDLE)

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """One group a part of this stage."""
        groups = super().parameter_groups(rate)
        return [group | {"lr": rate * (self.kept_lr if group["name"] in self.kept else 1.0)} for group in groups]


def _everywhere(part: str) -> bool:
    """Whether every stage has a part."""
    return part == REST


class VariantEngine(StudentsEngine):
    """DeepSpeed's 1F1B over a variant; all parts are clipped, and skipped if not finite, together."""

    def __init__(self, variant: Variant, config: dict[str, Any], settings: Finetune, precision: Precision) -> None:
        self.ema = settings.ema
        super().__init__(variant, config, settings, precision)

    def make_optimizer(self, *arguments: Any, **options: Any) -> WholeOptimizer:
        stages = self.mpu.get_pipe_parallel_group()
        return WholeOptimizer(*arguments, stages=stages, copies=self.module.copies, ema=self.ema, **options)

    def _exec_reduce_tied_grads(self) -> None:
        """What every stage has gets the gradients of all, as each used it."""
        for name, gradient in zip(self.optimizer.names, self.optimizer.fp32_groups_gradients_flat, strict=True):
            if _everywhere(name):
                dist.all_reduce(gradient, group=self.grid.get_pipe_parallel_group())

    _INSTRUCTION_MAP = {  # noqa: RUF012
        **StudentsEngine._INSTRUCTION_MAP,
        schedule.ReduceTiedGrads: _exec_reduce_tied_grads,
    }

    def train_step(self) -> None:
        """One optimizer step on what lies in the stages' inboxes."""
        self.train_batch(self._nothing())
        self.timers(TRAIN_BATCH_TIMER).reset()  # it would keep two events of every step for a report that is never made

    def told_step(self, own: Sequence[Tensor]) -> list[Tensor]:
        """`train_step`, and what the model has put out for this rank's own micro-batches.

        Args:
            own: for each of these, in their order, a tensor shaped like that.
        """
        stage, group, mine = self.module.stage, self.grid.get_pipe_parallel_group(), self.stage_id
        stage.said = [] if stage.last else None
        self.train_step()
        if not stage.last:
            last = self.grid.stage_to_global(self.num_stages - 1)
            said = [torch.empty_like(like, memory_format=torch.contiguous_format) for like in own]
            for each in said:
                dist.recv(each, last, group=group)
            return said
        assert stage.said is not None
        for place, each in enumerate(stage.said):  # in every round, each rank of the group had one of them
            if (owner := place % self.num_stages) != mine:
                dist.send(each.contiguous(), self.grid.stage_to_global(owner), group=group)
        return stage.said[mine :: self.num_stages]

    @torch.no_grad()
    def output(self, arguments: Arguments, size: Size) -> Tensor:
        """One forward through all stages; collective, those of a pipe group with the same arguments.

        Returns:
            What the model puts out, (B, ...), on every rank.
        """
        stage = self.module.stage
        stage.inbox.append(stage_batch(arguments, size, {}))
        self.total_loss = None  # else the stock method would add the velocity to it
        found = self.eval_batch(self._nothing(), compute_loss=False, reduce_output=None, num_micro_batches=1)
        last = self.grid.stage_to_global(self.num_stages - 1)
        like = [(found[0].shape, found[0].dtype) if stage.last else None]  # which no earlier stage knows
        dist.broadcast_object_list(like, src=last, group=self.grid.get_pipe_parallel_group())
        shape, dtype = like[0] or (torch.Size(), torch.float32)
        output = found[0].contiguous() if stage.last else torch.empty(shape, dtype=dtype, device=self.device)
        dist.broadcast(output, last, group=self.grid.get_pipe_parallel_group())
        return output

    def _nothing(self) -> Any:
        """What DeepSpeed passes to the first stage as its input and to the last as labels: both read their inboxes."""
        nothing = torch.zeros((), device=self.device)
        return repeat((nothing, nothing))
