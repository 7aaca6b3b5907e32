"""What a teacher reads: encoded prompts, and batches of latents with their prompts.

Shapes: B batch, C latent channels, H and W latent height and width, S text tokens, E embedding channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Prompts:
    """Encoded captions.

    Attributes:
        embeds: (B, S, E) float.
        mask: (B, S) bool, True for real tokens; None where the family reads padding as it reads text.
        pooled: (B, P) float, or None for families without a pooled embedding.
    """

    embeds: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None

    @staticmethod
    def stack(prompts: Sequence[Prompts]) -> Prompts:
        """Join single prompts (each with B = 1) into one batch, padded with zeros to the longest."""
        embeds = pad_sequence([p.embeds[0] for p in prompts], batch_first=True)
        mask = None
        if prompts[0].mask is not None:
            mask = pad_sequence([p.mask[0] for p in prompts if p.mask is not None], batch_first=True)
        pooled = None
        if prompts[0].pooled is not None:
            pooled = torch.cat([p.pooled for p in prompts if p.pooled is not None])
        return Prompts(embeds, mask, pooled)

    def row(self, index: int) -> Prompts:
        """One prompt of the batch, trimmed to its own length."""
        mask = None if self.mask is None else self.mask[index : index + 1]
        length = self.embeds.shape[1] if mask is None else int(mask.sum())
        return Prompts(
            self.embeds[index : index + 1, :length],
            None if mask is None else mask[:, :length],
            None if self.pooled is None else self.pooled[index : index + 1],
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Prompts:
        return Prompts(
            self.embeds.to(device, dtype),
            None if self.mask is None else self.mask.to(device),
            None if self.pooled is None else self.pooled.to(device, dtype),
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch of encoded text-image pairs.

    Attributes:
        latents: (B, C, H, W) float, clean.
        prompts: B encoded captions.
        keys: B sample keys, for messages.
        captions: B captions, as they were before they were encoded.
    """

    latents: Tensor
    prompts: Prompts
    keys: tuple[str, ...]
    captions: tuple[str, ...]

    @staticmethod
    def stack(batches: Sequence[Batch]) -> Batch:
        """Join batches of one latent shape into one."""
        rows = [batch.prompts.row(i) for batch in batches for i in range(len(batch.keys))]
        return Batch(
            torch.cat([batch.latents for batch in batches]),
            Prompts.stack(rows),
            tuple(key for batch in batches for key in batch.keys),
            tuple(caption for batch in batches for caption in batch.captions),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        return replace(self, latents=self.latents.to(device, dtype), prompts=self.prompts.to(device, dtype))

    def drop_captions(self, empty: Prompts, share: float, generator: torch.Generator) -> Batch:
        """Replace each caption by the empty one with probability `share`.

        Args:
            empty: the encoded empty caption, B = 1.
            generator: CPU generator; B numbers are drawn from it.
        """
        dropped = (torch.rand(len(self.keys), generator=generator) < share).tolist()
        if not any(dropped):
            return self
        rows = [empty if drop else self.prompts.row(i) for i, drop in enumerate(dropped)]
        return replace(self, prompts=Prompts.stack(rows))
