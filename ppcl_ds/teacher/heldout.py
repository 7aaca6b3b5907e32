"""How far one model's velocities are from another's, on the same held-out data and noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from ppcl_ds.data.noising import NoisyBatch, NoisyStream
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.call import Caller


class HeldOut:
    """The first held-out micro-batches, the same for every model.

    Attributes:
        batches: `evaluate.velocity_batches` of `evaluate.batch_size` samples.
    """

    def __init__(self, recipe: Recipe, caller: Caller, device: torch.device) -> None:
        self.caller, self.device = caller, device
        settings = recipe.evaluate
        stream = NoisyStream(recipe, "heldout", settings.batch_size, device)
        self.batches: list[NoisyBatch] = [b for _, b in islice(stream.take(0, 1), settings.velocity_batches)]

    def velocities(self, model: nn.Module) -> list[Tensor]:
        """The model's velocity for every micro-batch, (B, C, H, W) float32 on the CPU.

        Args:
            model: already in the recipe's dtype; it is moved to the device.
        """
        model.to(self.device)
        return [self.velocity(model, batch) for batch in self.batches]

    @torch.no_grad()
    def velocity(self, model: nn.Module, batch: NoisyBatch) -> Tensor:
        """The velocity for one micro-batch, (B, C, H, W) float32 on the CPU."""
        return self.caller(model, batch.latents, batch.prompts, batch.sigmas).float().cpu()


def mean_squared(own: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Mean squared difference, micro-batches weighing the same."""
    pairs = zip(own, others, strict=True)
    return float(torch.stack([(one - other).square().mean() for one, other in pairs]).mean())
