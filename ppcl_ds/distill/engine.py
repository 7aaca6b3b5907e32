"""The students' engine: DeepSpeed's pipeline engine with a schedule that has no bubble.

In the local phase each unit is judged by teacher activations alone, so stages owe each other nothing and none waits.
"""

from __future__ import annotations

import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor


class LocalEngine(PipelineEngine):
    """A `PipelineEngine` whose stages each compute their own losses from their own inputs, without sends."""

    def _train_schedule(self) -> schedule.PipeSchedule:
        return schedule.DataParallelSchedule(self.micro_batches, 1, 0)

    def is_first_stage(self) -> bool:
        """True: every stage reads its own inputs."""
        return True

    def is_last_stage(self) -> bool:
        """True: every stage computes a loss."""
        return True

    def _aggregate_total_loss(self) -> Tensor:
        """The loss of the whole library: the sum over stages, the mean over micro-batches and data replicas.

        The stock method lets the last stage broadcast; here every stage is a last one and all would hang.
        """
        loss = self._scale_loss_by_gas(self.total_loss).detach().clone()
        dist.all_reduce(loss, group=self.grid.get_pipe_parallel_group())
        dist.all_reduce(loss, group=self.grid.get_data_parallel_group())
        return loss / self.grid.get_data_parallel_world_size()
