"""The demo's diffusers pipelines: a Qwen-Image transformer between captions and pixels, which weigh next to nothing.

This file also travels in every folder that the pipeline is saved to, under its full name, so that diffusers draws with
it where nothing of ours is installed (`trust_remote_code=True`): it imports torch, diffusers and what they need only.
Shapes: B batch, C channels, H and W height and width of latents, S text tokens, E embedding channels, P pooled;
latents are packed for the transformer, 2 x 2 patches as tokens: (B, H/2 * W/2, 4 C).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import BertModel, PreTrainedTokenizerBase

MODULE = "ppcl_ds.demo.pipeline"
"""This file's name in a folder's index, wherever it was loaded from."""


class _Weightless(ModelMixin, ConfigMixin):
    """A model that is made by its configuration alone.

    Its only buffer says on which device and in which dtype the model is; a file of no tensors could not be loaded.
    """

    home = MODULE

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(1))


class Embedded(NamedTuple):
    """Captions as vectors."""

    embeds: Tensor
    """(B, S, E), zeros where the mask is False."""
    mask: Tensor | None
    """(B, S) bool; None where every caption has the same number of tokens."""
    pooled: Tensor | None
    """(B, P), if there are any."""


class WordTable(_Weightless):
    """One fixed vector of N(0, 1) for each word, the same on every machine; words are all it understands.

    Values are rounded to bfloat16, so that nothing is lost where they are stored in it.

    Args:
        width: E.
        pooled_width: P; 0 for none.
        max_tokens: tokens of every caption, cut or padded with zeros; 0: each has its own length, and there is a mask.
    """

    @register_to_config
    def __init__(self, width: int, pooled_width: int = 0, max_tokens: int = 0) -> None:
        super().__init__()
        self._vectors: dict[tuple[str, str], Tensor] = {}

    def forward(self, captions: Sequence[str]) -> Embedded:
        """B captions, padded to the longest unless `max_tokens` is set."""
        limit, width, pooled_width = self.config.max_tokens, self.config.width, self.config.pooled_width
        # The empty caption is one token of its own.
        split = [(re.findall(r"\w+", caption.lower()) or [""])[: limit or None] for caption in captions]
        embeds = torch.zeros(len(split), limit or max(map(len, split)), width)
        mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        for row, words in enumerate(split):
            embeds[row, : len(words)] = torch.stack([self._vector("token", word, width) for word in words])
            mask[row, : len(words)] = True
        pooled = None
        if pooled_width:
            rows = [torch.stack([self._vector("pooled", word, pooled_width) for word in words]) for words in split]
            pooled = torch.stack([_as_stored(row.mean(dim=0)) for row in rows]).to(self.place)
        return Embedded(embeds.to(self.place), None if limit else mask.to(self.place.device), pooled)

    def _vector(self, table: str, word: str, width: int) -> Tensor:
        """(width,) row of `word` in `table`."""
        if (table, word) not in self._vectors:
            # Not `hash()`: Python salts it anew in every process.
            seed = int.from_bytes(hashlib.sha256(f"{table}:{word}".encode()).digest()[:8], "big")
            generator = torch.Generator().manual_seed(seed)
            self._vectors[table, word] = _as_stored(torch.randn(width, generator=generator))
        return self._vectors[table, word]


def _as_stored(values: Tensor) -> Tensor:
    return values.bfloat16().float()


class PixelVae(_Weightless):
    """The image itself as its latent, in [-1, 1].

    Args:
        channels: C, 1 (grey) or 3 (RGB).
    """

    side = 1

    @register_to_config
    def __init__(self, channels: int) -> None:
        super().__init__()

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images (B, C or 3, H, W) in [-1, 1] -> a distribution that is a point, (B, C, H, W)."""
        if x.shape[1] != self.config.channels:
            x = _grey(x)
        posterior = DiagonalGaussianDistribution(torch.cat([x, torch.full_like(x, -30)], dim=1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """(B, C, H, W) -> the same, clamped to [-1, 1]."""
        image = z.clamp(-1, 1)
        return DecoderOutput(sample=image) if return_dict else (image,)


def _grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 1, H, W), with PIL's weights and PIL's rounding."""
    red, green, blue = ((x.float() + 1) * 127.5).round().int().split(1, dim=1)
    grey = (red * 19595 + green * 38470 + blue * 7471 + (1 << 15)) >> 16
    return (grey / 127.5 - 1).to(x.dtype)


class DigitsPipeline(DiffusionPipeline):
    """Draws what a caption says, as Qwen-Image's pipeline does, with plain classifier-free guidance."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    pixels = 8
    """Of a side of the images that it draws unless it is told."""

    # Models are not called by their own classes here: diffusers runs this file once for each component that it loads,
    # so a class of one run would not be that of another.
    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: ModelMixin,
        text_encoder: ModelMixin,
        transformer: QwenImageTransformer2DModel,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, vae=vae, text_encoder=text_encoder, transformer=transformer)
        self.vae_scale_factor, grey = vae.side, vae.config.channels == 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 * vae.side, do_convert_grayscale=grey)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the index, and our files to the places where diffusers looks for what the index names."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        index_file = Path(save_directory, self.config_name)
        index = json.loads(index_file.read_text())
        index["_class_name"] = [MODULE, type(self).__name__]
        places = [(index_file.parent, MODULE, type(self))]
        for name, part in self.components.items():
            if module := getattr(part, "home", None):
                index[name] = [module, type(part).__name__]
                places.append((index_file.parent / name, module, type(part)))
        index_file.write_text(json.dumps(index, indent=2) + "\n")
        for place, module, its_class in places:
            place.mkdir(exist_ok=True)
            shutil.copyfile(inspect.getfile(its_class), place / f"{module}.py")

    def encode_prompt(
        self, prompt: str | Sequence[str], device: torch.device | None = None, num_images_per_prompt: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """Captions -> embeddings (B, S, E) and mask (B, S), B captions x images; no mask if none needs it."""
        embeds, mask = self.embed([prompt] if isinstance(prompt, str) else list(prompt))
        embeds = embeds.to(device or self._execution_device).repeat_interleave(num_images_per_prompt, dim=0)
        if mask is not None:
            mask = None if mask.all() else mask.to(embeds.device).repeat_interleave(num_images_per_prompt, dim=0)
        return embeds, mask

    def embed(self, captions: list[str]) -> tuple[Tensor, Tensor | None]:
        """What the text encoder says of captions: embeddings (B, S, E) and mask (B, S)."""
        return self.text_encoder(captions)[:2]

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Packed noise (B, H/2 * W/2, 4 C): drawn, or `latents`, which is packed already; sides are in pixels."""
        if latents is not None:
            return latents.to(device, dtype)
        side = self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // side, width // side)
        return self.pack_latents(randn_tensor(shape, generator=generator, device=device, dtype=dtype))

    @staticmethod
    def pack_latents(latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/2 * W/2, 4 C)."""
        batch, channels, height, width = latents.shape
        patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(batch, height // 2 * (width // 2), channels * 4)

    @staticmethod
    def unpack_latents(latents: Tensor, height: int, width: int) -> Tensor:
        """(B, H/2 * W/2, 4 C) -> (B, C, H, W)."""
        batch, _, features = latents.shape
        patches = latents.reshape(batch, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(batch, features // 4, height, width)

    def check_inputs(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str], height: int, width: int
    ) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ValueError: captions are not text, or are not as many as those to stay away from; a side is no multiple
                of a token's.
        """
        for name, captions in {"prompt": prompt, "negative_prompt": negative_prompt}.items():
            if not captions and not isinstance(captions, str):
                raise ValueError(f"`{name}` is empty")
            if not all(isinstance(caption, str) for caption in captions):
                raise ValueError(f"`{name}` has to be a text or a list of texts, but is {captions!r}")
        both_lists = not isinstance(prompt, str) and not isinstance(negative_prompt, str)
        if not isinstance(negative_prompt, str) and (not both_lists or len(negative_prompt) != len(prompt)):
            raise ValueError("`negative_prompt` has to be one text, or as many as `prompt`")
        token = 2 * self.vae_scale_factor
        if height % token or width % token:
            raise ValueError(f"`height` and `width` have to be multiples of {token}, but are {height} and {width}")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        true_cfg_scale: float = 1.25,
        num_images_per_prompt: int = 1,
        sigmas: Sequence[float] | np.ndarray | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw images.

        Args:
            prompt: one caption or several.
            negative_prompt: what to stay away from; one for all captions, or one for each.
            height: of an image in pixels, a whole number of tokens; default: `pixels`.
            width: likewise.
            num_inference_steps: Euler steps.
            true_cfg_scale: classifier-free guidance; up to 1 there is none, and one forward a step instead of two.
            num_images_per_prompt: images of each caption.
            sigmas: noise levels before the scheduler's shift, one a step; default: from 1 down to one step above 0.
            generator: of the noise.
            latents: packed noise to begin with, (B, H/2 * W/2, 4 C).
            output_type: `pil`, `np` (B, H, W, C), `pt` (B, C, H, W), or `latent`, packed.
            return_dict: whether the images come as `.images`, or in a tuple.
        """
        height, width = height or self.pixels, width or self.pixels
        self.check_inputs(prompt, negative_prompt, height, width)
        captions = [prompt] if isinstance(prompt, str) else list(prompt)
        unwanted = [negative_prompt] * len(captions) if isinstance(negative_prompt, str) else list(negative_prompt)
        device, guided = self._execution_device, true_cfg_scale > 1
        positive = self.encode_prompt(captions, device, num_images_per_prompt)
        negative = self.encode_prompt(unwanted, device, num_images_per_prompt) if guided else None

        batch, channels = len(captions) * num_images_per_prompt, self.transformer.config.in_channels // 4
        dtype = positive[0].dtype
        latents = self.prepare_latents(batch, channels, height, width, dtype, device, generator, latents)
        rows, columns = height // self.vae_scale_factor, width // self.vae_scale_factor
        img_shapes = [[(1, rows // 2, columns // 2)]] * batch

        if sigmas is None:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        self.scheduler.set_begin_index(0)
        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for time in timesteps:
                velocity = self.velocity("cond", latents, time, img_shapes, *positive)
                if negative is not None:
                    plain = self.velocity("uncond", latents, time, img_shapes, *negative)
                    velocity = plain + true_cfg_scale * (velocity - plain)
                latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
                progress_bar.update()

        if output_type == "latent":
            images: Any = latents
        else:
            image = self.vae.decode(self.unpack_latents(latents, rows, columns), return_dict=False)[0]
            images = self.image_processor.postprocess(image, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def velocity(
        self, context: str, latents: Tensor, time: Tensor, img_shapes: list[Any], embeds: Tensor, mask: Tensor | None
    ) -> Tensor:
        """What the transformer says, packed; `context` keeps its caches apart, if it has any."""
        with self.transformer.cache_context(context):
            return self.transformer(
                hidden_states=latents,
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask,
                timestep=time.expand(len(latents)).to(latents.dtype) / 1000,
                img_shapes=img_shapes,
                return_dict=False,
            )[0]


class EmojiPipeline(DigitsPipeline):
    """The same for larger images in colour, with BERT as the text encoder, whose words have a meaning."""

    pixels = 32

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: ModelMixin,
        text_encoder: BertModel,
        tokenizer: PreTrainedTokenizerBase,
        transformer: QwenImageTransformer2DModel,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, transformer)
        self.register_modules(tokenizer=tokenizer)

    @torch.no_grad()
    def embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """BERT's last hidden states (B, S, E), zeros where the mask (B, S) is False."""
        found = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(
            self.text_encoder.device
        )
        mask = found["attention_mask"].bool()
        return self.text_encoder(**found).last_hidden_state * mask.unsqueeze(-1), mask
