"""How each family's own `forward` is called: latents, prompts and noise level in, velocity out.

This is all that is written per family; blocks are reached through hooks (`anatomy.py`).
Shapes: B batch, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ppcl_ds.data.batch import Prompts
from ppcl_ds.errors import UserError

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Caller:
    """Arguments for a family's `forward`, and the velocity in its output.

    Attributes:
        arguments: `(config, latents (B, C, H, W), prompts, sigma (B,) in [0, 1]) -> keyword arguments`.
        packed: whether the family's tokens are 2 x 2 patches of the latents, packed before the call.
    """

    arguments: Callable[[Any, Tensor, Prompts, Tensor], Arguments]
    packed: bool

    def __call__(self, model: torch.nn.Module, latents: Tensor, prompts: Prompts, sigma: Tensor) -> Tensor:
        """Run `model` (the transformer or an engine around it) and return its velocity, (B, C, H, W).

        Velocity is `noise - data` (flow matching): the data is `latents - sigma * velocity`.
        """
        output = self.run(model, latents, prompts, sigma)
        return _unpack(output, latents.shape[-2]) if self.packed else output

    def run(self, model: torch.nn.Module, latents: Tensor, prompts: Prompts, sigma: Tensor) -> Tensor:
        """Run `model` and return what its forward returns, as the family lays it out."""
        config = getattr(model, "module", model).config
        return model(**self.arguments(config, latents, prompts, sigma), return_dict=False)[0]


def _pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4 C), as diffusers' Qwen-Image and FLUX pipelines pack."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def _unpack(tokens: Tensor, height: int) -> Tensor:
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height // 2, p=2, q=2)


def _qwen_image(config: Any, latents: Tensor, prompts: Prompts, sigma: Tensor) -> Arguments:
    """See diffusers `QwenImagePipeline.__call__`."""
    batch, _, height, width = latents.shape
    return {
        "hidden_states": _pack(latents),
        "encoder_hidden_states": prompts.embeds,
        "encoder_hidden_states_mask": prompts.mask,
        "timestep": sigma,
        "img_shapes": [[(1, height // 2, width // 2)]] * batch,
    }


def _flux(config: Any, latents: Tensor, prompts: Prompts, sigma: Tensor) -> Arguments:
    """See diffusers `FluxPipeline.__call__`; guidance-distilled teachers are asked at their usual 3.5."""
    _, _, height, width = latents.shape
    rows = torch.arange(height // 2, device=latents.device)
    columns = torch.arange(width // 2, device=latents.device)
    image_ids = torch.cartesian_prod(rows.new_zeros(1), rows, columns).to(latents.dtype)  # (S_img, 3)
    return {
        "hidden_states": _pack(latents),
        "encoder_hidden_states": prompts.embeds,
        "pooled_projections": prompts.pooled,
        "timestep": sigma,
        "img_ids": image_ids,
        "txt_ids": image_ids.new_zeros(prompts.embeds.shape[1], 3),
        "guidance": torch.full_like(sigma, 3.5) if config.guidance_embeds else None,
    }


def _sd3(config: Any, latents: Tensor, prompts: Prompts, sigma: Tensor) -> Arguments:
    """See diffusers `StableDiffusion3Pipeline.__call__`; this family counts time in thousandths."""
    return {
        "hidden_states": latents,
        "encoder_hidden_states": prompts.embeds,
        "pooled_projections": prompts.pooled,
        "timestep": sigma * 1000,
    }


_CALLERS = {
    "QwenImageTransformer2DModel": Caller(_qwen_image, packed=True),
    "FluxTransformer2DModel": Caller(_flux, packed=True),
    "SD3Transformer2DModel": Caller(_sd3, packed=False),
}


def caller_for(class_name: str) -> Caller:
    """The way to call the transformer class `class_name`.

    Raises:
        UserError: the family is not known.
    """
    if class_name not in _CALLERS:
        raise UserError(f"teacher class {class_name} is not supported; known: {', '.join(sorted(_CALLERS))}")
    return _CALLERS[class_name]
