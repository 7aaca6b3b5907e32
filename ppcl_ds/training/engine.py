"""The students in DeepSpeed: what is trained as a pipeline module, and its engine, with an optimizer of ours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import BFLOAT16
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils.timer import NoopTimer
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn

from ppcl_ds.sections import Precision, Training
from ppcl_ds.training.optimizer import UnitOptimizer


class Students(PipelineModule):
    """Layers over the pipeline stages; each rank builds only its stage's.

    Every rank must construct it.

    Args:
        costs: of each layer, in any unit; the stages get neighbours of about equal cost.
        options: of `PipelineModule`.
    """

    def __init__(self, layers: Sequence[LayerSpec], costs: Sequence[int], stages: int, **options: Any) -> None:
        self.costs = list(costs)
        with redirect_stdout(StringIO()):  # it prints its layout line by line
            super().__init__(list(layers), num_stages=stages, **options)

    def _count_layer_params(self) -> list[int]:
        """The cost of each layer; the stock method would build every layer on every rank to count it."""
        return self.costs

    @property
    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        """What is trained on this stage: name of a part -> its parameters by name. A part is one flat vector to the
        optimizer and to checkpoints."""
        raise NotImplementedError

    @property
    def copies(self) -> frozenset[str]:
        """Parts that another stage also has, and writes into checkpoints."""
        return frozenset()

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """For torch's optimizer: one group a part of this stage, with the part's name.

        Args:
            rate: learning rate.
        """
        return [{"params": list(own.values()), "name": name, "lr": rate} for name, own in self.trained.items()]


class StudentsEngine(PipelineEngine):
    """A `PipelineEngine` over what is trained, with an optimizer in which every part stands for itself.

    Where stages send each other something, `train_batch` is its step, on the stock schedule, 1F1B. Where they do not, a
    step is a plain loop: `accumulate` for every loss of this stage, then `finish_step`.

    Args:
        students: built on every rank of the world.
        config: the students' DeepSpeed file.
        settings: batch, steps and optimizer.
        precision: dtype of the parameters.
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

    def accumulate(self, loss: Tensor) -> None:
        """Add to the step's gradients those of a micro-batch's loss, (); its activations are freed.

        The step's loss is the mean over its micro-batches.
        """
        self._scale_loss_by_gas(loss).backward()

    def finish_step(self) -> None:
        """Average the gradients over the replicas and take one optimizer step; all replicas of a stage together."""
        self._exec_reduce_grads()
        self._exec_optimizer_step()

    def _bf16_reduce_grads(self) -> None:
        """Average the gradients over the data replicas, unit by unit, in float32 and in place.

        The stock method copies several units into one bucket: what a unit's sum rounds to would depend on its company.
        """
        for part, gradient in enumerate(self.optimizer.fp32_groups_gradients_flat):
            gradient /= self.dp_world_size
            dist.all_reduce(gradient, group=self.grid.get_data_parallel_group())
            self.optimizer.averaged(part)

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        return BFLOAT16

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer) -> UnitOptimizer:
        with redirect_stdout(StringIO()):  # it prints the memory before and after every group
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
        return UnitOptimizer(*arguments, **options)
