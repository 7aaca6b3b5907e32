"""How far one model's velocities are from another's, on the same held-out data and noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.noising import NoisyBatch
from ppcl_ds.teacher.samples import read_samples
from ppcl_ds.teacher.teacher import Teacher


class HeldOut:
    """The first held-out micro-batches, the same for every model.

    Where there are captions alone, the first model, usually the teacher, draws the samples.

    Attributes:
        batches: `evaluate.velocity_batches` of `evaluate.batch_size` samples, on the CPU.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, device: torch.device) -> None:
        self.recipe, self.teacher, self.device = recipe, teacher, device
        self.batches: list[NoisyBatch] = []

    def velocities(self, model: nn.Module) -> list[Tensor]:
        """What the model says of every micro-batch, (B, ...) as the scheduler steps by it, float32 on the CPU.

        Args:
            model: already in the recipe's dtype; it can be run on the device.
        """
        if not self.batches:
            settings, cpu = self.recipe.evaluate, torch.device("cpu")
            samples = read_samples(self.recipe, self.teacher, model, "heldout", settings.batch_size, 0, 1, self.device)
            self.batches = [batch.to(cpu) for _, batch in islice(samples, settings.velocity_batches)]
        return [self.velocity(model, batch) for batch in self.batches]

    @torch.no_grad()
    def velocity(self, model: nn.Module, batch: NoisyBatch) -> Tensor:
        """What the model says of one micro-batch, likewise."""
        return self.teacher.answer(model, batch.to(self.device)).float().cpu()


def mean_squared(own: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Mean squared difference, micro-batches weighing the same."""
    pairs = zip(own, others, strict=True)
    return float(torch.stack([(one - other).square().mean() for one, other in pairs]).mean())
