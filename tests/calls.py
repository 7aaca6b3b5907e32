"""The three families' transformers called by hand, as their stock pipelines call them; no pipeline is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

Arguments = dict[str, Any]


def arguments_by_hand(
    class_name: str, latents: Tensor, embeds: Tensor, sigmas: Tensor, mask: Tensor | None, pooled: Tensor | None
) -> Arguments:
    """What a transformer's forward is given.

    Args:
        latents: (B, C, H, W), noisy.
        embeds: (B, S, E).
        sigmas: (B,) in [0, 1].
        mask: (B, S), which tokens count; only Qwen-Image has one.
        pooled: (B, P); all but Qwen-Image have them.
    """
    batch, _, height, width = latents.shape
    if class_name.endswith("SD3Transformer2DModel"):  # it counts time in thousandths
        given: Arguments = {"hidden_states": latents, "timestep": sigmas * 1000, "pooled_projections": pooled}
        return given | {"encoder_hidden_states": embeds}
    given = {"hidden_states": packed(latents), "timestep": sigmas, "encoder_hidden_states": embeds}
    if class_name.endswith("QwenImageTransformer2DModel"):
        return given | {
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, height // 2, width // 2)]] * batch,
        }
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(height / 2), torch.arange(width / 2)).to(latents.dtype)
    return given | {"pooled_projections": pooled, "img_ids": ids, "txt_ids": ids.new_zeros(embeds.shape[1], 3)}


def packed(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4 C), as Qwen-Image and FLUX read latents."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def random_arguments(
    class_name: str,
    seed: int = 1,
    lengths: Sequence[int] = (5, 5),
    sigmas: Sequence[float] = (0.3, 0.8),
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Samples of 8 x 8 latents, for the tiny teachers.

    Args:
        lengths: text tokens of each, behind which there is padding; Qwen-Image alone is told of it.
        sigmas: noise level of each.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths)
    latents, embeds, pooled = (
        torch.randn(batch, *shape, generator=generator).to(dtype) for shape in ((1, 8, 8), (longest, 16), (8,))
    )
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return arguments_by_hand(class_name, latents, embeds, torch.tensor(sigmas, dtype=dtype), mask, pooled)


def called(model: Any, arguments: Arguments) -> Tensor:
    """What a transformer, or an engine around it, puts out."""
    return model(**arguments | {"return_dict": False})[0]


@torch.no_grad()
def answer(model: Any, arguments: Arguments) -> Tensor:
    """The same, of a model that is not trained."""
    return called(model, arguments)


def call_once(model: Any) -> Tensor:
    """Call a tiny teacher, empty or not."""
    return answer(model, random_arguments(type(model).__name__))
