"""The students' engines: DeepSpeed's pipeline engine with an optimizer of ours; and one whose schedule has no bubble.

In the local phase each unit is judged by teacher activations alone, so stages owe each other nothing and none waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import BFLOAT16
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils.timer import NoopTimer
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor

from ppcl_ds.sections import Precision, Training
from ppcl_ds.training.optimizer import UnitOptimizer
from ppcl_ds.training.students import Students


class StudentsEngine(PipelineEngine):
    """A `PipelineEngine` over what is trained, with an optimizer in which every part stands for itself.

    Its schedule is the stock one, 1F1B; `LocalEngine` has the one of the local phase.

    Args:
        students: built on every rank of the world.
        config: the students' DeepSpeed file.
        settings: batch, steps and optimizer.
        precision: number format of the parameters.
    """

    def __init__(self, students: Students, config: dict[str, Any], settings: Training, precision: Precision) -> None:
        self.settings = settings.optimizer
        optimizer = torch.optim.AdamW(
            students.parameter_groups(settings.optimizer.lr),
            lr=self.settings.lr,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        mpu = students.mpu()
        config = config | {
            "train_micro_batch_size_per_gpu": settings.micro_batch,
            "gradient_accumulation_steps": settings.micro_batches_per_step // mpu.get_data_parallel_world_size(),
            "bf16": config.get("bf16", {}) | {"enabled": precision == "bf16"},
        }
        super().__init__(
            args=None,
            model=students,
            optimizer=optimizer,
            model_parameters=[p for p in students.parameters() if p.requires_grad],
            training_data=None,
            lr_scheduler=get_cosine_schedule_with_warmup(optimizer, self.settings.warmup_steps, settings.steps),
            mpu=mpu,
            dist_init_required=False,
            collate_fn=None,
            config=config,
            config_class=DeepSpeedConfig(config, mpu),
        )
        self.using_bf16_optimizer = True  # DeepSpeed asks for its very class, not for one that inherits from it

    def _bf16_reduce_grads(self) -> None:
        """Average the gradients over the data replicas, unit by unit, in float32 and in place.

        The stock method copies several units into one bucket: what a unit's sum rounds to would depend on its company.
        """
        for gradient in self.optimizer.fp32_groups_gradients_flat:
            gradient /= self.dp_world_size
            dist.all_reduce(gradient, group=self.grid.get_data_parallel_group())

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        return BFLOAT16

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer) -> UnitOptimizer:
        with redirect_stdout(StringIO()):  # it prints the memory before and behind every group
            return self.make_optimizer(
                optimizer,
                self.param_names,
                clip_norm=self.settings.clip_norm,
                offload=self.settings.offload,
                mpu=self.mpu,
                allgather_bucket_size=self.zero_allgather_bucket_size(),
                dp_process_group=self.seq_data_parallel_group,
                timers=NoopTimer(),
            )

    def make_optimizer(self, *arguments: Any, **options: Any) -> UnitOptimizer:
        """The optimizer around torch's."""
        return UnitOptimizer(*arguments, **options)


class TrainUnits(schedule.BufferOpInstruction):
    """Forward and backward of every unit of this stage, one unit after the other."""


class LocalSchedule(schedule.PipeSchedule):
    """A stage's micro-batches one after the other, without sends, and so without a stage that waits for another."""

    def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
        """Yield the instructions, a list a micro-batch."""
        for number in range(self.micro_batches):
            last = number == self.micro_batches - 1
            at_the_end = [schedule.ReduceGrads(), schedule.OptimizerStep()] if last else []
            yield [schedule.LoadMicroBatch(buffer_id=0), TrainUnits(buffer_id=0), *at_the_end]

    def num_pipe_buffers(self) -> int:
        """One: a micro-batch is done with before the next one comes."""
        return 1


class LocalEngine(StudentsEngine):
    """Its stages each compute their own losses from their own inputs."""

    total_loss: Tensor | None

    def _train_schedule(self) -> schedule.PipeSchedule:
        return LocalSchedule(self.micro_batches, self.num_stages, self.stage_id)

    def _train_units(self, buffer_id: int) -> None:
        """A unit's backward follows its forward, so that memory holds the activations of one unit, not of all."""
        start = self.pipe_buffers["inputs"][buffer_id]
        self._running_engine_backward = True  # as the stock stages do: keeps the engine's own hooks out of it
        total = start.detach() if self.total_loss is None else self.total_loss
        for layer in self.module.layers:
            loss = layer(start)
            self._scale_loss_by_gas(loss).backward()
            total = total + loss.detach()
        self.total_loss = total
        self._running_engine_backward = False

    _INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP, TrainUnits: _train_units}  # noqa: RUF012

    def is_first_stage(self) -> bool:
        """True: every stage reads its own inputs."""
        return True

    def is_last_stage(self) -> bool:
        """True: no stage has another behind it."""
        return True

    def _aggregate_total_loss(self) -> Tensor:
        """This stage's own loss; those of all units are gathered where they are logged.

        The stock method lets the last stage broadcast; here every stage is a last one and all would hang.
        """
        return self._scale_loss_by_gas(self.total_loss)
