"""The students' optimizers: ZeRO-1 with float32 masters; every unit by itself, or all parts of one model together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from torch import Tensor, nn

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
        if offload:
            for parameters, master in zip(self.bf16_groups, self.masters, strict=True):
                master.data = master.data.cpu()
                for parameter in parameters:
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

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One AdamW step of every unit whose gradient is finite; the others stay wholly as they are.

        Gradients have been averaged over the replicas, so every replica of a stage decides alike.
        """
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in self.fp32_groups_gradients_flat])
        self.norms = dict(zip(self.names, norms.tolist(), strict=True))
        lengths = self.clip_norms()
        shares = self.fp32_groups_gradient_flat_partition
        for (name, length), master, share in zip(lengths.items(), self.masters, shares, strict=True):
            if not math.isfinite(length):
                self.skipped[name] += 1
                master.grad = None  # torch's optimizers pass over it: neither moments nor weight decay move
                continue
            if self.clip_norm and length > self.clip_norm:
                share.mul_(self.clip_norm / (length + _SMALLEST))
            master.grad = share.to(master.device)
        self.optimizer.step()
        self.update_ema()
        for master in self.masters:
            master.grad = None
        self.update_lp_params()
        self.clear_hp_grads()

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
