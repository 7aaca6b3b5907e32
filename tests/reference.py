"""The plain training that both trainings are held against: what one process computes that knows no DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppcl_ds.sections import Optimizer


class PlainAdamW:
    """Parameters of any dtype that are clipped together, with float32 masters and gradients summed in float32.

    Args:
        named: name -> parameter.
        steps: of the whole training.
        factors: on the learning rate, of the names that have one.

    Attributes:
        masters: name -> master.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        settings: Optimizer,
        steps: int,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        self.parameters, self.settings, self.steps, self.taken = dict(named), settings, steps, 0
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.sums = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        groups = [{"params": [m], "factor": (factors or {}).get(name, 1.0)} for name, m in self.masters.items()]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay)

    def add_gradients(self) -> None:
        """Take the gradients of a micro-batch from the parameters."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.sums[name] += parameter.grad.float()
                parameter.grad = None

    def step(self) -> float:
        """Clip, step and round to the parameters; the norm of the gradient before it was clipped."""
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in self.sums.values()))
        for name, master in self.masters.items():
            master.grad = self.sums[name] * min(1.0, self.settings.clip_norm / norm)
            self.sums[name] = torch.zeros_like(master)
        for group in self.adamw.param_groups:
            group["lr"] = group["factor"] * self._rate()
        self.adamw.step()
        for name, parameter in self.parameters.items():
            parameter.data = self.masters[name].to(parameter.dtype, copy=True)
        self.taken += 1
        return norm

    def _rate(self) -> float:
        """One step of warm-up, then half a cosine."""
        if not self.taken:
            return 0.0
        return self.settings.lr * 0.5 * (1 + math.cos(math.pi * (self.taken - 1) / (self.steps - 1)))

    def moment(self, what: str) -> dict[str, Tensor]:
        """Name -> `exp_avg` or `exp_avg_sq`."""
        return {name: self.adamw.state[master][what] for name, master in self.masters.items()}


def distance(student: Tensor, teacher: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """The mean over tokens that count of the squared distance of directions and of the logarithms' of lengths.

    Args:
        student: (B, S, C), as `teacher`.
        mask: (B, S), which tokens count.
        weights: (B,), of the samples.
    """
    student, teacher = student.float(), teacher.float()
    angle = 2 - 2 * F.cosine_similarity(student, teacher, dim=-1)
    size = (student.norm(dim=-1) / teacher.norm(dim=-1)).log() ** 2
    counted = torch.ones_like(angle, dtype=torch.bool) if mask is None else mask
    found = angle + size if weights is None else (angle + size) * weights[:, None]
    return found[counted].mean()


def change_missed(student: Tensor, teacher: Tensor, twins: Tensor) -> Tensor:
    """How wrong the difference of samples with and without prompt is, over what it is in the teacher; both squared.

    Args:
        student: (B, S, C), as `teacher`.
        twins: (B,), of a sample without prompt the place of the same one with it, of others their own.
    """
    wrong, right = torch.zeros(()), torch.zeros(())
    for place, twin in enumerate(twins.tolist()):
        own, true = ((each[twin] - each[place]).float() for each in (student, teacher))
        wrong, right = wrong + ((own - true) ** 2).sum(), right + (true**2).sum()
    return wrong / right if right > 0 else wrong
