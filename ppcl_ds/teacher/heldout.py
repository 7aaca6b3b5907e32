"""How far one model's velocities are from another's, on the same held-out data and noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from ppcl_ds import launcher
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.branches import LEVELS, Branches, Sampled, squared_errors
from ppcl_ds.teacher.noising import NoisyBatch
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.samples import read_samples
from ppcl_ds.teacher.teacher import Teacher, forward


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


class GuidedHeldOut:
    """The same micro-batches as the recipe samples, with its guidance.

    Attributes:
        places: of each micro-batch's samples on the ladder of noise, (B,).
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, device: torch.device) -> None:
        self.count, self.device = recipe.evaluate.velocity_batches, device
        self.branches = understood(recipe, teacher.call, recipe.evaluate.batch_size)
        self.batches: list[Sampled] = []

    @property
    def places(self) -> list[Tensor]:
        return [sampled.batch.places for sampled in self.batches]

    def says(self, model: nn.Module) -> dict[str, list[Tensor]]:
        """What `Branches.says` gives of every micro-batch; nothing where it is not known how the pipeline guides."""
        if self.branches is None:
            return {}
        ask = partial(forward, model)
        if not self.batches:
            clean = islice(self.branches.clean(0, 1, ask, self.device), self.count)
            self.batches = [self.branches.noisy(number, batch) for number, batch in clean]
        said = [self.branches.says(ask, sampled.to(self.device)) for sampled in self.batches]
        return {name: [each[name] for each in said] for name in said[0]}


def understood(recipe: Recipe, call: PipelineCall, micro_batch: int) -> Branches | None:
    """Micro-batches with the recipe's guidance; None, and a line, where it is not known how the pipeline guides."""
    try:
        return Branches(recipe, call, micro_batch)
    except UserError as fault:
        launcher.say_once(f"velocities with guidance are left out: {fault}")
        return None


def by_noise(own: Sequence[Tensor], others: Sequence[Tensor], places: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Fifths of the samples, the noisiest first: their mean place, and the mean squared difference.

    Args:
        own, others: (B, ...) each.
        places: (B,) each; empty where they are not known, which gives nothing.
    """
    errors = torch.cat([squared_errors(one, other) for one, other in zip(own, others, strict=True)])
    joined = torch.cat(list(places))
    parts = joined.argsort().tensor_split(LEVELS)
    return [(float(joined[part].mean()), float(errors[part].mean())) for part in parts if len(part)]


def mean_squared(own: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Mean squared difference, micro-batches weighing the same."""
    pairs = zip(own, others, strict=True)
    return float(torch.stack([(one - other).square().mean() for one, other in pairs]).mean())
