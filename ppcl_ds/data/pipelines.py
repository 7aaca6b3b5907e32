"""Encoders of a diffusers pipeline folder: its VAE, its text encoders, and nothing else of it is loaded.

Shapes: B batch, C latent channels, H and W latent height and width, S text tokens, E embedding channels, P pooled.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from ppcl_ds.data.batch import Prompts
from ppcl_ds.errors import UserError, brief
from ppcl_ds.sections import CaptionEncoding


@dataclass(frozen=True)
class Family:
    """How the `encode_prompt` of a pipeline class is called and what it returns."""

    usual_tokens: int
    """`max_tokens` that the family was trained with; 0: its captions have a mask and their own length."""
    options: dict[str, Any]
    """Arguments beside the captions, the device and the limit."""
    mask: int | None = None
    """Place of the mask in what is returned; the embeddings are the first."""
    pooled: int | None = None
    """Place of the pooled embedding."""
    clip_in_front: bool = False
    """Whether CLIP's tokens stand before those that `max_sequence_length` counts."""


FAMILIES = {
    "QwenImagePipeline": Family(0, {}, mask=1),
    "FluxPipeline": Family(512, {"prompt_2": None}, pooled=1),
    "StableDiffusion3Pipeline": Family(
        333,
        {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False},
        pooled=2,
        clip_in_front=True,
    ),
    "WanPipeline": Family(512, {"do_classifier_free_guidance": False}),
}
"""Pipeline classes whose encoders can be used; what is returned is as in diffusers' `pipeline_*.py` of each."""


class PipelineTextEncoder:
    """Captions as a stock pipeline's own `encode_prompt` encodes them (templates, dropped tokens and all).

    Args:
        folder: the pipeline folder; only its tokenizers and text encoders are read.
        captions: `max_tokens` is the whole length, CLIP's tokens included where the family has them (SD3);
            `width` and `pooled_width` must be those of the text encoders.
        device: where the text encoders run and prompts are returned.
        dtype: of the text encoders; default bfloat16 on CUDA, float32 elsewhere.

    Raises:
        UserError: the folder has no such text encoders, or `captions` does not suit them.
    """

    def __init__(
        self,
        folder: Path,
        captions: CaptionEncoding,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        class_name = _class_name(folder)
        self.family, self.device = FAMILIES[class_name], torch.device(device)
        tokens, usual = captions.max_tokens, self.family.usual_tokens
        if usual and not tokens:
            raise UserError(f"data.captions.max_tokens is 0, but {class_name} has no text mask; {usual} is usual")
        if tokens and not usual:
            raise UserError(f"data.captions.max_tokens is {tokens}, but {class_name} has a text mask; leave it out")
        self.pipeline = _load(folder, class_name, ("tokenizer", "text_encoder"), self.device, dtype)
        if self.family.clip_in_front:
            clip = self.pipeline.tokenizer_max_length
            if tokens <= clip:
                raise UserError(
                    f"data.captions.max_tokens is {tokens}, but {class_name} needs {clip} of them for CLIP's tokens;"
                    f" {usual} is usual"
                )
            tokens -= clip
        self.limit = {"max_sequence_length": tokens} if tokens else {}
        # A warning for each caption that is cut would bury everything else.
        logging.get_logger(type(self.pipeline).__module__).setLevel(logging.ERROR)
        empty = self.encode([""])
        widths = {
            "width": empty.embeds.shape[-1],
            "pooled_width": 0 if empty.pooled is None else empty.pooled.shape[-1],
        }
        for key, width in widths.items():
            if getattr(captions, key) != width:
                raise UserError(f"data.captions.{key} is {getattr(captions, key)}, but {folder} encodes to {width}")

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Prompts:
        """B captions -> embeds (B, S, E) and pooled (B, P) float32, and for families with a text mask mask (B, S).

        With a mask S is the longest caption's length, otherwise `max_tokens`; longer captions are cut.
        """
        returned = self.pipeline.encode_prompt(
            prompt=list(captions), device=self.device, **self.family.options, **self.limit
        )
        embeds, mask, pooled = returned[0].float(), None, None
        if self.family.mask is not None:
            mask = returned[self.family.mask]  # None: no padding in this batch
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        if self.family.pooled is not None:
            pooled = returned[self.family.pooled].float()
        return Prompts(embeds, mask, pooled)


class VaeEncoder:
    """Images as the latents that the pipeline's transformer was trained on, and back.

    An image is the mode of what the VAE says, so encoding is deterministic, normalised as the stock pipelines do
    (`_encode_vae_image` and the end of `__call__` in diffusers' `pipeline_*.py`): by `latents_mean` and `latents_std`
    where the VAE has them, else by `shift_factor` and `scaling_factor`. For video VAEs an image is one frame.

    Args:
        folder: the pipeline folder; only its VAE is read.
        step: sides of all images are multiples of it.
        device: where the VAE runs and latents are returned.
        dtype: of the VAE; default bfloat16 on CUDA, float32 elsewhere.

    Raises:
        UserError: the folder has no such VAE, or it cannot encode images whose sides are multiples of `step`.
    """

    def __init__(
        self, folder: Path, step: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        class_name = _class_name(folder)
        self.device = torch.device(device)
        pipeline = _load(folder, class_name, ("vae",), self.device, dtype)
        self.vae = pipeline.vae
        self.vae.enable_slicing()  # memory for one image, however many are asked for
        self.processor = getattr(pipeline, "image_processor", None) or pipeline.video_processor
        self.factor: int = self.processor.config.vae_scale_factor
        if step % self.factor:
            raise UserError(f"data.images.step is {step}, but {folder} encodes multiples of {self.factor} pixels")
        self.is_video = any(isinstance(module, nn.Conv3d) for module in self.vae.modules())
        config = self.vae.config
        mean, scale = torch.tensor(config.get("shift_factor") or 0.0), torch.tensor(config.get("scaling_factor") or 1.0)
        if config.get("latents_mean") is not None:
            mean, scale = torch.tensor(config.latents_mean), 1 / torch.tensor(config.latents_std)
        self.mean, self.scale = (values.view(-1, 1, 1).to(self.device) for values in (mean, scale))  # (C or 1, 1, 1)

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """B RGB images of one size -> (B, C, H, W) float32.

        Raises:
            UserError: a side is not a multiple of what the VAE needs; the message says of what.
        """
        for side in images[0].size:
            if side % self.factor:  # diffusers would resize the image and not say so
                raise UserError(
                    f"an image of {images[0].width} x {images[0].height} pixels: sides must be multiples of"
                    f" {self.factor}; set data.images.step"
                )
        pixels = self.processor.preprocess(list(images)).to(self.device, self.vae.dtype)  # (B, 3, height, width)
        latents = self.vae.encode(pixels.unsqueeze(2) if self.is_video else pixels).latent_dist.mode()
        return ((latents.squeeze(2) if self.is_video else latents).float() - self.mean) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) latents -> (B, 3, height, width) float32 images in [-1, 1], on the latents' device."""
        means = (latents.to(self.device, torch.float32) / self.scale + self.mean).to(self.vae.dtype)
        images = self.vae.decode(means.unsqueeze(2) if self.is_video else means).sample
        return (images[:, :, 0] if self.is_video else images).to(latents.device, torch.float32).clamp(-1, 1)


def _class_name(folder: Path) -> str:
    """The pipeline class that the folder names, one of `FAMILIES`."""
    try:
        name = str(json.loads((folder / "model_index.json").read_text())["_class_name"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f"data.pipeline {folder}: no readable model_index.json; give a diffusers pipeline folder"
        ) from None
    if name not in FAMILIES:
        raise UserError(f"data.pipeline {folder} is a '{name}'; encoders are known for {', '.join(FAMILIES)}")
    return name


def _load(
    folder: Path, class_name: str, wanted: tuple[str, ...], device: torch.device, dtype: torch.dtype | None
) -> Any:
    """The stock pipeline on `device`, with those components alone whose names begin with one of `wanted`."""
    pipeline_class = getattr(diffusers, class_name)
    names = set(inspect.signature(pipeline_class).parameters)
    parts = sorted(name for name in names if name.startswith(wanted))
    listed = json.loads((folder / "model_index.json").read_text())
    for name in parts:
        if not (folder / name).is_dir() or not (listed.get(name) or [None])[0]:
            raise UserError(f"data.pipeline {folder}: {name} is missing; copy the whole pipeline folder again")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with warnings.catch_warnings():
            # The older ones of the supported releases know no other name for it.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            loaded = pipeline_class.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, **dict.fromkeys(names.difference(parts))
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as fault:
        reason = brief(fault)[:300]
        raise UserError(f"data.pipeline {folder}: cannot load {', '.join(parts)} ({reason})") from None
    return loaded.to(device)
