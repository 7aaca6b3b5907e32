"""Micro-batches as the teacher reads them: encoded samples with noise, as the stock pipeline would give them to it.

Places on the ladder are drawn as diffusers' training scripts draw them; noise is the scheduler's own rule.
Shapes: B samples; latents as the scheduler steps them, (B, ...).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.data.batch import Batch, Prompt, Sample, Size
from ppcl_ds.data.stored import Texts
from ppcl_ds.data.stream import MicroBatchStream, read_texts
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import Noise
from ppcl_ds.teacher.batch_call import Asked, BatchCall
from ppcl_ds.teacher.pipeline_call import Arguments, PipelineCall

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_DIFFUSERS_NAME = {"logit_normal": "logit_normal", "uniform": "none"}


def draw_places(noise: Noise, batch: int, generator: torch.Generator) -> Tensor:
    """Draw places on a ladder as the recipe says: density, share of uniform ones.

    Args:
        noise: the recipe's `noise` section.
        batch: how many.
        generator: CPU generator; how much is drawn from it depends on `batch` alone.

    Returns:
        (B,) float32 in [0, 1); 0 is the noisiest rung.
    """
    places = compute_density_for_timestep_sampling(
        _DIFFUSERS_NAME[noise.density], batch, logit_mean=0.0, logit_std=1.0, generator=generator
    )
    uniform = torch.rand(batch, generator=generator)
    chosen = torch.rand(batch, generator=generator) < noise.uniform_share
    return torch.where(chosen, uniform, places)


def place_quantiles(noise: Noise, shares: Sequence[float]) -> Tensor:
    """The places above whose noise these shares of `draw_places`'s lie; (S,), as good as 2^16 draws tell."""
    drawn = draw_places(noise, 2**16, torch.Generator().manual_seed(0))
    return drawn.quantile(1 - torch.tensor(shares), interpolation="nearest")


def level_weights(places: Tensor, levels: tuple[Tensor, Tensor]) -> Tensor:
    """Weights of samples by their noise, (B,) float32.

    Args:
        places: (B,), see `draw_places`.
        levels: known places, ascending, and the weights there, both (N,) float32 on the device of `places`; linear in
            between, constant beyond the ends.
    """
    known, weights = levels
    if len(known) == 1:
        return weights.expand(len(places))
    after = torch.bucketize(places, known).clamp(1, len(known) - 1)
    share = ((places - known[after - 1]) / (known[after] - known[after - 1])).clamp(0, 1)
    return torch.lerp(weights[after - 1], weights[after], share)


@dataclass(frozen=True)
class NoisyBatch:
    """A micro-batch as the teacher reads it.

    Attributes:
        arguments: of the transformer's forward, all samples joined.
        target: (B, ...) float32, what a perfect model would put out, as the scheduler steps by it; of trajectories, for
            which nobody knows it, no elements.
        number: of the micro-batch, if it is of trajectories, which what the teacher says of it takes further.
        other: the same, each sample with the prompt that it does not have in `arguments`, if guidance needs that.
        places: (B,) where on the ladder, see `draw_places`.
        twins: (B,) int64; of a sample without prompt, the place of the one that has its prompt and is else the same, if
            there is one; else its own place.
    """

    arguments: Arguments
    target: Tensor
    size: Size
    number: int | None = None
    other: Arguments | None = None
    places: Tensor = field(default_factory=lambda: torch.zeros(0))
    twins: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def to(self, device: torch.device) -> NoisyBatch:
        moved = pytree.tree_map_only(Tensor, lambda t: t.to(device), (self.arguments, self.target, self.other))
        return replace(self, arguments=moved[0], target=moved[1], other=moved[2])


class Noiser:
    """Adds noise to encoded samples and asks the pipeline what its transformer reads of them.

    Args:
        texts: what all samples share.
        dtype: that the teacher runs in.
    """

    def __init__(self, call: PipelineCall, texts: Texts, dtype: torch.dtype) -> None:
        self.call, self.texts, self.dtype = call, texts, dtype
        self.batches = BatchCall(call, texts.joining)

    def empty(self, sample: Sample) -> Prompt:
        """What the empty caption becomes beside a sample."""
        return sample.empty or self.texts.empty

    def noise(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clean latents and fresh noise for them, both (B, ...) float32.

        Args:
            generator: CPU generator; see `Rearrangement.noise`.

        Raises:
            UserError: the latents are not those of this pipeline's VAE.
        """
        size, latents = batch.size, batch.latents.float()
        layout = self.call.to_vae(size)
        if latents.shape[1:] != layout.shape:
            raise UserError(
                f"latents of shape {tuple(latents.shape[1:])}, but for {size.height} x {size.width} pixels the VAE of "
                f"{self.call.folder} has {tuple(layout.shape)}; encode the data with this teacher's pipeline"
            )
        shape = self.call.latents_shape(size)[1:]
        return layout.inverse(latents, shape), layout.noise(len(latents), shape, generator)

    def joined(self, samples: Sequence[Sample], guided: bool) -> Prompt:
        """Prompts of some samples together; if `guided`, as the pipeline reads them with guidance.

        Raises:
            UserError: they cannot be.
        """
        prompt = self.batches.joined([sample.prompt for sample in samples])
        if not guided:
            return prompt
        if self.texts.guiding is None:
            raise UserError(
                f"{self.call.folder}: what {type(self.call.pipe).__name__} reads with guidance cannot be made of "
                "stored prompts; set evaluate.guidance: 1"
            )
        empty = self.batches.joined([self.empty(sample) for sample in samples])
        return replace(prompt, text=self.texts.guiding(prompt.text, empty.text))

    def noisy(
        self, batch: Batch, places: Tensor, generator: torch.Generator, twins: Tensor | None = None
    ) -> NoisyBatch:
        """Samples with noise of these places, (B,) in [0, 1) of the teacher's own rungs.

        Args:
            twins: see `NoisyBatch`; None: there are none.
        """
        twins = torch.arange(len(places)) if twins is None else twins
        places = places[twins]
        asked, target = self.asked(batch, places, generator, twins)
        return NoisyBatch(self.batches.arguments(asked, batch.size), target, batch.size, places=places, twins=twins)

    def asked(
        self, batch: Batch, places: Tensor, generator: torch.Generator, twins: Tensor | None = None
    ) -> tuple[list[Asked], Tensor]:
        """What is asked of each of these samples, and what a perfect model would put out for all of them, (B, ...)."""
        clean, noise = self.noise(batch, generator)
        noise = noise if twins is None else noise[twins]
        ladder, own = self.call.ladder(batch.size), self.call.own_rungs(batch.size)
        rungs = [own[int(place * len(own))] for place in places]
        rows = list(zip(clean.split(1), noise.split(1), rungs, strict=True))
        asked = [
            Asked(ladder.noisy(*row).to(self.dtype), row[-1], sample.prompt.to(self.dtype))
            for row, sample in zip(rows, batch.samples, strict=True)
        ]
        return asked, torch.cat([ladder.target(*row) for row in rows])


class NoisyStream:
    """Endless numbered micro-batches with noise, on the CPU; number j is the same whoever reads it.

    Everything random about micro-batch j (noise, its levels, dropped captions) is drawn from a generator seeded by
    (seed, j), so neither the number of ranks nor a restart changes it, and no random state needs saving.

    Args:
        call: the teacher's pipeline.
        split: `train` in shuffled order, `heldout` in stored order.
        micro_batch: samples in a micro-batch.
        lanes: micro-batches in an optimizer step; the recipe's distillation by default.
        captions: whether captions without an image count, see `MicroBatchStream`.
        paired: whether samples without prompt are twins of others, see `Batch.drop_captions`.
    """

    def __init__(
        self,
        recipe: Recipe,
        call: PipelineCall,
        split: Literal["train", "heldout"],
        micro_batch: int,
        lanes: int | None = None,
        captions: bool = False,
        paired: bool = False,
    ) -> None:
        self.settings: Noise = recipe.noise
        self.seed, self.paired = recipe.seed, paired
        self.noiser = Noiser(call, read_texts(recipe.data), DTYPES[recipe.teacher.precision])
        self.clean = MicroBatchStream(
            recipe.data,
            split,
            micro_batch,
            recipe.seed,
            recipe.bad_samples,
            lanes=lanes or recipe.distill.micro_batches_per_step,
            captions=captions,
        )

    def take(self, start: int, stride: int) -> Iterator[tuple[int, NoisyBatch]]:
        """Micro-batches start, start + stride, ... with their numbers."""
        for number, batch in self.clean.take(start, stride):
            yield number, self.with_noise(number, batch)

    def with_noise(self, number: int, batch: Batch) -> NoisyBatch:
        """Micro-batch `number` with its noise."""
        generator, share = self.generator(number), self.settings.caption_dropout
        batch, twins = batch.drop_captions(self.noiser.empty, share, generator, self.paired)
        return self.noiser.noisy(batch, draw_places(self.settings, len(batch.samples), generator), generator, twins)

    def generator(self, number: int) -> torch.Generator:
        """All that is random about micro-batch `number` is drawn from it."""
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator().manual_seed(seed)
