"""A micro-batch asked for: every sample at its own place of the ladder, together or by itself and then joined.

Shapes: B samples; latents as the scheduler steps them, (B, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.text import Joining, equal, leaves
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.at_once import Asked, AtOnce
from ppcl_ds.teacher.pipeline_call import Arguments, PipelineCall


class BatchCall:
    """Arguments of the transformer for several samples of one size.

    Args:
        call: the pipeline.
        texts: how captions are joined; as learned when they were encoded.
    """

    def __init__(self, call: PipelineCall, texts: Joining) -> None:
        self.call, self.texts = call, texts
        self._joining: dict[tuple[Size, tuple[bool, ...]], Joining] = {}
        self._at_once: dict[tuple[Size, tuple[bool, ...]], AtOnce | None] = {}
        """None: not for such micro-batches."""

    def arguments(self, samples: Sequence[Asked], size: Size) -> Arguments:
        """What the stock pipeline would give its transformer for all of them together.

        Raises:
            UserError: captions of these lengths cannot be read together, or the pipeline reads one sample at a time.
        """
        prompts = self._alike([sample.prompt for sample in samples])
        samples = [replace(sample, prompt=prompt) for sample, prompt in zip(samples, prompts, strict=True)]
        if len(samples) == 1:
            return self.call.arguments(samples[0].latents, samples[0].rung, samples[0].prompt, size)
        # With masks in the captions, other arguments are tensors.
        key = size, tuple(isinstance(leaf, Tensor) for _, leaf in leaves(tuple(samples[0].prompt.text)))
        if key in self._at_once:
            at_once = self._at_once[key]
            return at_once(samples) if at_once else self._one_by_one(samples, size)
        # The first micro-batch of a kind is put together both ways; the short one is taken only if they do not differ.
        expected, at_once = self._one_by_one(samples, size), AtOnce(self.call, self.texts, size, samples[0])
        self._at_once[key] = at_once if at_once.possible and equal(at_once(samples), expected) else None
        return expected

    def _one_by_one(self, samples: Sequence[Asked], size: Size) -> Arguments:
        each = [self.call.arguments(sample.latents, sample.rung, sample.prompt, size) for sample in samples]
        # A mask that is there for some captions and None for others is joined in two ways.
        key = size, tuple(isinstance(leaf, Tensor) for _, leaf in leaves(each[0]))
        if key not in self._joining:
            self._joining[key] = self._learned(samples[0], size)
        try:
            return self._joining[key](each)
        except RuntimeError:  # torch's, of sizes
            raise UserError(
                f"{self.call.folder}: {type(self.call.pipe).__name__} reads captions of unlike length in its own "
                "way; use micro_batch: 1"
            ) from None

    def joined(self, prompts: Sequence[Prompt]) -> Prompt:
        """Prompts together, as if they had been encoded together.

        Raises:
            UserError: they cannot be.
        """
        if len(prompts) == 1:
            return prompts[0]
        if prompts[0].source:
            raise UserError(f"{self.call.folder}: source images are read one by one; use a batch of 1")
        return Prompt(self.texts([tuple(prompt.text) for prompt in self._alike(prompts)]))

    def _alike(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with captions of one length."""
        texts = [tuple(prompt.text) for prompt in prompts]
        longer = self.texts.lengthened(texts)
        unlike = len({_shapes(text) for text in texts}) > 1
        if unlike and not self.texts.padded:
            raise UserError(
                f"{self.call.folder}: captions of unlike length cannot be joined for {type(self.call.pipe).__name__}, "
                "which encodes padding as it encodes text; use micro_batch: 1"
            )
        return [replace(prompt, text=text) for prompt, text in zip(prompts, longer, strict=True)]

    def _learned(self, sample: Asked, size: Size) -> Joining:
        """How arguments are joined: from those for a sample, and for the same sample twice."""
        one = self.call.arguments(sample.latents, sample.rung, sample.prompt, size)
        text, images = tuple(sample.prompt.text), tuple(sample.prompt.images)
        twice = Prompt(self.texts([text, text]), images, sample.prompt.source)
        two = self.call.arguments(torch.cat([sample.latents] * 2), sample.rung, twice, size)
        try:
            return Joining.learn(one, one, two)
        except ValueError as fault:
            name = type(self.call.pipe).__name__
            raise UserError(f"{self.call.folder}: {name} cannot be asked for two samples at a time ({fault})") from None


def _shapes(text: object) -> tuple[torch.Size, ...]:
    return tuple(leaf.shape for leaf in pytree.tree_leaves(text) if isinstance(leaf, Tensor))
