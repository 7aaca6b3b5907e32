"""The students' optimizers: ZeRO-1 with float32 masters; every unit by itself, or all parts of one model together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor, nn

from ppcl_ds.training.offload import Offload

_SMALLEST = 1e-6
"""Added to a norm that is divided by, as `torch.nn.utils.clip_grad_norm_` does."""


class UnitOptimizer(BF16_Optimizer):
    """DeepSpeed's ZeRO-1 optimizer, one parameter group a unit.

    Each unit is one flat vector: parameters in the run's dtype and gradients summed up in float32 are whole on
    every data replica, float32 masters and moments are divided over them. Clipping and what is not finite are settled
    unit by unit; the stock class takes one norm over all units of all stages, and skips them all together.

    Args:
        optimizer: with one parameter group a unit, whose `name` says which.
        clip_norm: longest gradient of a unit; 0: any.
        offload: keep masters and moments in CPU memory.
        arguments: of the stock class.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *arguments: Any, clip_norm: float, offload: bool, **options: Any
    ) -> None:
        self.names: list[str] = [group["name"] for group in optimizer.param_groups]
        self.clip_norm = clip_norm
        self.norms: dict[str, float] = {}
        """Gradient norm of each unit in the last step, before clipping."""
        self.skipped = dict.fromkeys(self.names, 0)
        """Steps that each unit has skipped because its gradient was not finite."""
        # Under float32, too: the masters are copies then, and there is one way to step, whatever the precision.
        # A gradient is added to its float32 sum, and freed, as soon as it is there.
        precision = DeepSpeedBF16Config(enabled=True, immediate_grad_update=True)
        super().__init__(optimizer, *arguments, bfloat16_config=precision, grad_acc_dtype=torch.float32, **options)
        self.offload = Offload(self.masters, self._own_parameters) if offload else None
        if self.offload is not None:
            for master in self.masters:
                master.data = master.data.new_empty(0)  # whoever else has it, it takes no memory where it was
            self.fp32_groups_flat_partition = self.offload.masters
            for group, master in zip(self.optimizer.param_groups, self.masters, strict=True):
                group["params"] = [master]
            self.optimizer.state.clear()
            for parameter in chain.from_iterable(self.bf16_groups):
                parameter._hp_mapping = None  # views of the master where it was, which would keep it there

    def _update_hp_grad(self, lp: Any, group: int, place: int, clear_lp_grads: bool) -> None:
        """Add a gradient to its float32 sum, in one kernel.

        The stock method makes a float32 copy first: 18 bytes moved for a bfloat16 gradient, and not 10. Bits are the
        same, as the kernel widens what it adds.
        """
        if lp.grad is None:
            return
        total = self.fp32_groups_gradients[group][place]
        total.add_(lp.grad.view(total.shape))
        lp._hp_grad = total
        self.fp32_groups_has_gradients[group][place] = True

    def accumulate_hp_grads_and_remove_lp(self, lp_param: nn.Parameter, *place: int) -> None:
        """Add a gradient to its float32 sum and free it; DeepSpeed before 0.19.8 keeps it, and so adds it again."""
        super().accumulate_hp_grads_and_remove_lp(lp_param, *place)
        lp_param.grad = None

    @property
    def masters(self) -> Sequence[Tensor]:
        """This replica's share of each unit's flat vector, float32."""
        return self.fp32_groups_flat_partition

    @property
    def _own_parameters(self) -> list[Tensor]:
        """This replica's share of each unit's parameters, (N,), in the run's dtype."""
        ranks = map(dist.get_rank, self.real_dp_process_group)
        return [shares[rank] for shares, rank in zip(self.bf16_partitioned_groups, ranks, strict=True)]

    def averaged(self, part: int) -> None:
        """The gradient of a part is that of the step now."""
        if self.offload is not None:
            self.offload.fetch(part, self.fp32_groups_gradient_flat_partition[part])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One AdamW step of every unit whose gradient is finite; the others stay wholly as they are.

        Gradients have been averaged over the replicas, so every replica of a stage decides alike.
        """
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in self.fp32_groups_gradients_flat])
        self.norms = dict(zip(self.names, norms.tolist(), strict=True))
        lengths = self.clip_norms()
        for part, (name, length) in enumerate(lengths.items()):
            if not math.isfinite(length):
                self.skipped[name] += 1  # neither moments nor weight decay move
            else:
                clips = 0 < self.clip_norm < length
                self._step_part(part, self.clip_norm / (length + _SMALLEST) if clips else 1.0)
        self.update_ema()
        self._share_parameters()
        self.clear_hp_grads()

    def _step_part(self, part: int, factor: float) -> None:
        """Step one part by its gradient times a factor; torch's optimizers pass over those without one."""
        master, offload = self.masters[part], self.offload
        gradient = offload.gradient(part) if offload else self.fp32_groups_gradient_flat_partition[part]
        if factor != 1.0:
            gradient.mul_(factor)
        master.grad = gradient
        self.optimizer.step()
        master.grad = None
        if offload:
            offload.send(part)

    def _share_parameters(self) -> None:
        """Give the other replicas the parameters that this one has stepped, and take theirs."""
        if self.offload is None:
            self.update_lp_params()
            return
        self.offload.wait()
        all_gather_dp_groups(
            groups_flat=self.bf16_groups_flat,
            partitioned_param_groups=self.bf16_partitioned_groups,
            dp_process_group=self.real_dp_process_group,
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )

    def clip_norms(self) -> dict[str, float]:
        """For each part of this stage, the gradient norm by which it is clipped, and skipped if not finite."""
        return self.norms

    def update_ema(self) -> None:
        """Called after each step; units keep no moving average."""


class WholeOptimizer(UnitOptimizer):
    """The same for the parts of one model: clipped by the norm over all of them, and skipped together.

    Args:
        stages: the pipe group, whose ranks hold the model between them; they step together.
        copies: parts whose gradients another stage counts, as it holds the same ones.
        ema: largest decay of a moving average of the masters, 0: none. It starts with those after the first step;
            after step t its decay is at most (1 + t) / (10 + t), as in diffusers' `EMAModel`, so that a short training
            leaves its beginning behind. It stands in the optimizer's state, as `ema`.
    """

    def __init__(
        self, *arguments: Any, stages: dist.ProcessGroup, copies: Sequence[str], ema: float, **options: Any
    ) -> None:
        self.stages, self.copies, self.ema = stages, copies, ema
        super().__init__(*arguments, **options)

    def clip_norms(self) -> dict[str, float]:
        """The norm over the whole model, for each part."""
        square = sum(norm**2 for name, norm in self.norms.items() if name not in self.copies)
        total = torch.tensor(square, dtype=torch.float64, device=self.fp32_groups_gradients_flat[0].device)
        dist.all_reduce(total, group=self.stages)
        return dict.fromkeys(self.names, math.sqrt(float(total)) if total.isfinite() else math.inf)

    def update_ema(self) -> None:
        """Move the average towards the masters."""
        for master in self.masters if self.ema else ():
            state = self.optimizer.state[master]
            if "ema" in state:
                steps = float(state["step"])
                state["ema"].lerp_(master, 1 - min(self.ema, (1 + steps) / (10 + steps)))
            elif state:
                state["ema"] = master.detach().clone()
