"""What a model says as it is sampled from: guided velocities, and what both branches of guidance differ by.

Shapes: B samples; latents as the scheduler steps them, (B, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from ppcl_ds.data.batch import Batch, Prompt, Sample
from ppcl_ds.data.stream import has_images
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.drawing import Drawing
from ppcl_ds.teacher.guidance import Guide, NotGuidedError
from ppcl_ds.teacher.noising import NoisyBatch, NoisyStream, place_quantiles
from ppcl_ds.teacher.pipeline_call import Arguments, PipelineCall

LEVELS = 5
"""Noise levels that errors are told apart by: fifths of what training draws, the noisiest first."""

_SPREAD = 0.618
"""Of the golden ratio: where in their fifths the levels of successive micro-batches lie."""

Answer = Callable[[Arguments], Tensor]
"""What a transformer puts out for arguments on its device."""


def level_name(level: int) -> str:
    """The quantile of training's noise that stands for a level: 0.9 for the noisiest fifth."""
    return f"{1 - (level + 0.5) / LEVELS:g}"


def squared_errors(own: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of every sample, (B,) float64."""
    return (own.double() - other.double()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class _Together:
    """Samples at one rung: their places in the micro-batch, and what guidance is told of them."""

    rows: list[int]
    latents: Tensor
    rung: int
    prompt: Prompt


@dataclass(frozen=True)
class Sampled:
    """A micro-batch as the recipe samples.

    Attributes:
        batch: with prompts; `other` without, where the recipe's guidance reads both.
        levels: (B,) int64, of the noise.
        together: the samples by rung, if both are read.
    """

    batch: NoisyBatch
    levels: Tensor
    together: Sequence[_Together] = ()

    def to(self, device: torch.device) -> Sampled:
        return replace(self, batch=self.batch.to(device))


class Branches:
    """Held-out micro-batches at the recipe's guidance, `evaluate.guidance`, and what models say of them.

    Samples take turns in `LEVELS` levels, and those of a micro-batch that have one level share a rung. Guidance is the
    stock pipeline's own. A transformer that takes the scale as a number reads it, in one forward. Where there are
    captions alone, the first model that is asked, the teacher, draws the images.

    Raises:
        UserError: the pipeline cannot be guided from stored prompts, or in a way that is not known; or two transformers
            would have to draw the images.
    """

    def __init__(self, recipe: Recipe, call: PipelineCall, micro_batch: int) -> None:
        self.recipe, self.call, self.micro_batch = recipe, call, micro_batch
        self.scale = recipe.evaluate.guidance
        self.both = call.reads_both(self.scale)
        self.has_images = has_images(recipe.data, "heldout")
        if not self.has_images and len(call.transformers()) > 1:
            raise UserError(
                f"{call.folder}: with captions alone, images that guidance is measured on would have to be drawn by "
                "two transformers; encode some images"
            )
        self.stream = NoisyStream(recipe, call, "heldout", micro_batch, captions=not self.has_images)
        self.guide = Guide(call)
        if self.both:
            self._try(self.stream.clean.batch(0).samples[0])

    def _try(self, sample: Sample) -> None:
        """Whether guidance is understood, before a model is asked."""
        size, both = sample.size, self.stream.noiser.joined([sample], True)
        own = self.call.own_rungs(size)
        said = torch.zeros(1, *self.call.output_shape(size)[1:])
        latents = torch.zeros(1, *self.call.latents_shape(size)[1:])
        self.guide(said, said, latents, own[len(own) // 2], both, size, self.scale)

    def clean(self, start: int, stride: int, ask: Answer, device: torch.device) -> Iterator[tuple[int, Batch]]:
        """Micro-batches start, start + stride, ... without noise, and their numbers.

        Args:
            ask: the teacher; where it is spread over ranks, and there are captions alone, all of them must iterate.
            device: that it reads from.
        """
        for number in count(start, stride):
            batch = self.stream.clean.batch(number)
            yield number, batch if self.has_images else self._drawn(number, batch, ask, device)

    def _drawn(self, number: int, batch: Batch, ask: Answer, device: torch.device) -> Batch:
        noiser, first = self.stream.noiser, number * self.micro_batch
        drawings = Drawing.several(self.recipe, self.call, noiser, batch.samples, self.micro_batch, first)
        drawn = torch.cat([drawing.latents(self.call.component, ask, device) for drawing in drawings])
        latents = self.call.to_vae(batch.size)(drawn).split(1)
        return Batch(tuple(replace(s, latents=own) for s, own in zip(batch.samples, latents, strict=True)))

    def noisy(self, number: int, clean: Batch) -> Sampled:
        """Micro-batch `number` with its noise, on the CPU."""
        size, noiser, samples = clean.size, self.stream.noiser, clean.samples
        first = number * self.micro_batch
        levels = torch.arange(first, first + len(samples)) % LEVELS
        within = (0.5 + number * _SPREAD) % 1
        quantiles = place_quantiles(self.recipe.noise, [1 - (level + within) / LEVELS for level in range(LEVELS)])
        places = quantiles[levels]
        with self.call.told({} if self.both else self.call.guided(self.scale)):
            asked, target = noiser.asked(clean, places, self.stream.generator(number))
            batch = NoisyBatch(noiser.batches.arguments(asked, size), target, size, places=places)
            if not self.both:
                return Sampled(batch, levels)
            bare = [
                replace(each, prompt=noiser.empty(sample).to(noiser.dtype))
                for each, sample in zip(asked, samples, strict=True)
            ]
            batch = replace(batch, other=noiser.batches.arguments(bare, size))
        rows_at: dict[int, list[int]] = {}
        for row, each in enumerate(asked):
            rows_at.setdefault(each.rung, []).append(row)
        by_itself = size.source or not noiser.batches.texts.padded
        groups = [(rung, [row]) for rung, rows in rows_at.items() for row in rows] if by_itself else rows_at.items()
        return Sampled(
            batch,
            levels,
            [
                _Together(
                    rows,
                    torch.cat([asked[row].latents for row in rows]).float(),
                    rung,
                    noiser.joined([samples[row] for row in rows], True),
                )
                for rung, rows in groups
            ],
        )

    @torch.no_grad()
    def says(self, ask: Answer, sampled: Sampled) -> dict[str, Tensor]:
        """What a model says of a micro-batch on its device, float32 on the CPU, as the scheduler steps by it.

        Returns:
            `velocity`, (B, ...), with the recipe's guidance; and where that reads both, `branches`, (B, ...): the
            velocity with the prompt, minus the one without.
        """
        batch, size = sampled.batch, sampled.batch.size
        own = ask(batch.arguments).float().cpu()
        prompted = self.call.stepped_by(own, size)
        if batch.other is None:
            return {"velocity": prompted}
        bare = ask(batch.other).float().cpu()
        guided = prompted.clone()
        for each in sampled.together:
            try:
                found = self.guide(
                    own[each.rows], bare[each.rows], each.latents, each.rung, each.prompt, size, self.scale
                )
            except NotGuidedError:
                continue
            guided[each.rows] = found.float()
        return {"velocity": guided, "branches": prompted - self.call.stepped_by(bare, size)}
