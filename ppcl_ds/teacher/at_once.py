"""A micro-batch asked for in one call, each sample at a rung of its own.

Of all arguments only a number a sample, its time, follows from the rung. It is asked for once a rung; then one call
gives the rest for all samples together.
Shapes: B samples; latents as the scheduler steps them, (B, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.text import Joining, equal, leaves, mapped
from ppcl_ds.teacher.pipeline_call import Arguments, PipelineCall


@dataclass(frozen=True)
class Asked:
    """What is asked of a sample.

    Attributes:
        latents: (1, ...), noisy.
        rung: of its ladder.
    """

    latents: Tensor
    rung: int
    prompt: Prompt


class AtOnce:
    """Samples of one size, asked for at once.

    Args:
        call: the pipeline.
        texts: how captions are joined.
        first: a sample, by which it is learned what follows from the rung.

    Attributes:
        possible: whether that is a number a sample, and nothing was made of source images.
    """

    def __init__(self, call: PipelineCall, texts: Joining, size: Size, first: Asked) -> None:
        self.call, self.texts, self.size = call, texts, size
        own = call.own_rungs(size)
        noisy, clean = (dict(leaves(self._alone(first, rung))) for rung in (own[0], own[-1]))
        self._timed = [path for path, leaf in noisy.items() if not equal(leaf, clean.get(path))]
        self._times: dict[int, list[Tensor]] = {}
        """Rung -> what follows from it, in the order of `_timed`."""
        numbers = all(isinstance(noisy[path], Tensor) and noisy[path].shape == (1,) for path in self._timed)
        self.possible = bool(self._timed) and numbers and not first.prompt.images

    def __call__(self, samples: Sequence[Asked]) -> Arguments:
        """Arguments for all samples together."""
        text = self.texts([tuple(sample.prompt.text) for sample in samples])
        latents = torch.cat([sample.latents for sample in samples])
        found = self.call.arguments(latents, samples[0].rung, Prompt(text), self.size)
        times = dict(zip(self._timed, map(torch.cat, zip(*map(self._of_rung, samples), strict=True)), strict=True))
        return mapped(found, lambda path, leaf: times.get(path, leaf))

    def _alone(self, sample: Asked, rung: int) -> Arguments:
        return self.call.arguments(sample.latents, rung, sample.prompt, self.size)

    def _of_rung(self, sample: Asked) -> list[Tensor]:
        if sample.rung not in self._times:
            found = dict(leaves(self._alone(sample, sample.rung)))
            self._times[sample.rung] = [found[path] for path in self._timed]
        return self._times[sample.rung]
