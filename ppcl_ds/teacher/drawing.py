"""Drawing by the stock pipeline from prompts that lie encoded, with any transformer's answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.data.batch import Batch, Sample
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.noising import Noiser
from ppcl_ds.teacher.pipeline_call import Arguments, PipelineCall


class Drawing:
    """What is drawn, the same for every model: prompts of some samples, and noise.

    Args:
        noiser: joins their prompts.
        samples: of one size.
        first: number of the first one; each has noise of its own.
        steps: of the sampler; None: the recipe's.

    Raises:
        UserError: with the recipe's guidance, these prompts cannot be read.
    """

    def __init__(
        self,
        recipe: Recipe,
        call: PipelineCall,
        noiser: Noiser,
        samples: Batch,
        first: int = 0,
        steps: int | None = None,
    ) -> None:
        self.call, self.size = call, samples.size
        self.steps, self.guidance = steps or recipe.evaluate.steps, recipe.evaluate.guidance
        layout, shape = call.to_vae(samples.size), call.latents_shape(samples.size)[1:]
        seeds = range(recipe.seed + first, recipe.seed + first + len(samples.samples))
        self.noise = torch.cat([layout.noise(1, shape, torch.Generator().manual_seed(seed)) for seed in seeds])
        guided = call.reads_both(self.guidance)
        self.prompt = noiser.joined(samples.samples, guided).to(noiser.dtype)

    @classmethod
    def several(
        cls,
        recipe: Recipe,
        call: PipelineCall,
        noiser: Noiser,
        samples: Sequence[Sample],
        most: int,
        first: int = 0,
        steps: int | None = None,
    ) -> list[Drawing]:
        """Samples in stored order, at most so many of one size together; from source images, one by one."""
        found: list[Drawing] = []
        for size, group in groupby(samples, lambda sample: sample.size):
            same = tuple(group)
            step = 1 if size.source else most
            for start in range(0, len(same), step):
                found.append(cls(recipe, call, noiser, Batch(same[start : start + step]), first + start, steps))
            first += len(same)
        return found

    @classmethod
    def shared(
        cls,
        recipe: Recipe,
        call: PipelineCall,
        noiser: Noiser,
        samples: Sequence[Sample],
        most: int,
        rank: int,
        ranks: int,
        first: int = 0,
        steps: int | None = None,
    ) -> list[tuple[bool, Drawing]]:
        """A rank's share of what `several` gives, neighbours, and whether each counts.

        All ranks get equally many: a model that is spread over ranks runs on all of them or on none.
        """
        each = -(-len(samples) // ranks)
        shares = [
            cls.several(recipe, call, noiser, samples[at : at + each], most, first + at, steps)
            for at in range(0, each * ranks, each)
        ]
        own = shares[rank] or shares[0]
        return [(number < len(shares[rank]), own[min(number, len(own) - 1)]) for number in range(max(map(len, shares)))]

    def latents(self, component: str, ask: Callable[[Arguments], Tensor], device: torch.device) -> Tensor:
        """Latents (B, ...) as the scheduler steps them, float32 on the CPU, where there is one transformer.

        Args:
            ask: what it puts out for arguments on the device.
        """

        def asked(arguments: Arguments) -> Tensor:
            return ask(pytree.tree_map_only(Tensor, lambda t: t.to(device), arguments)).cpu()

        return self.draw({component: asked})[0]

    def draw(
        self, answers: Mapping[str, Callable[[Arguments], Any]], decode: Callable[..., Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Latents (B, ...) as the scheduler steps them, float32; and images (B, C, height, width) in [-1, 1].

        Args:
            answers: component -> what a transformer puts out for arguments on the CPU.
            decode: latents to images; None: they are not decoded.
        """
        with torch.no_grad():
            latents, images = self.call.draw(
                answers, self.noise, self.prompt, self.size, self.steps, self.guidance, decode
            )
        if images is not None and images.dim() == 5:  # of a clip, the frame in its middle
            images = images[:, images.shape[1] // 2]
        return latents.float(), None if images is None else images.float().cpu() * 2 - 1
