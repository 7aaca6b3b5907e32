"""Images to latents and captions to prompts, by the teacher's own pipeline, and latents back to images.

Shapes: B batch, C latent channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.guiding import Guiding
from ppcl_ds.data.stored import Texts
from ppcl_ds.errors import UserError
from ppcl_ds.sections import Data
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.pipeline_check import check
from ppcl_ds.teacher.pipeline_files import Encodes, open_pipeline
from ppcl_ds.teacher.replacing import as_tree
from ppcl_ds.teacher.weightless import WithoutWeights

_LONGER = "a caption of several words"
"""Beside the empty one, what joining is learned from."""


class Encoder:
    """A pipeline whose VAE and text encoders are loaded.

    Args:
        folder: the pipeline.
        component, options: see `PipelineCall`.
        device: where the models run.
        images: whether images will be encoded; else the VAE is not loaded.

    Raises:
        UserError: they cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        component: str = "transformer",
        options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        images: bool = True,
    ) -> None:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        encodes: Encodes = "all" if images else "text"
        self.call = PipelineCall(folder, component, options, encodes=encodes, device=device, dtype=dtype)
        self.layouts = PipelineCall(folder, component, options)
        self.device, self.dtype = device, dtype
        if not callable(getattr(self.call.pipe.vae, "encode", None)):
            raise UserError(f"{folder}: its VAE does not encode images")
        self.call.pipe.vae.requires_grad_(False)
        self._frames: dict[Size, int] = {}

    @property
    def factor(self) -> int:
        """Pixels of a side that become one latent."""
        return int(getattr(self.call.pipe, "vae_scale_factor", None) or 8)

    def reads_sources(self, size: Size) -> bool:
        """Whether the pipeline draws samples of this size from a source image."""
        return self.layouts.example(size).source is not None

    def frames(self, size: Size) -> int:
        """As `frames_read`; every size is asked for once."""
        if size not in self._frames:
            self._frames[size] = frames_read(self.layouts, size)
        return self._frames[size]

    @torch.no_grad()
    def latents(self, clips: Sequence[Sequence[Image.Image]]) -> Tensor:
        """B clips of one size and length, images being clips of one frame -> what the VAE says, its mean.

        Returns:
            (B, C[, F], H, W) float32 on the CPU.

        Raises:
            UserError: the pipeline does not draw images of this size.
        """
        (width, height), frames = clips[0][0].size, len(clips[0])
        layout = self.layouts.to_vae(Size(height, width, frames))
        pipe = self.call.pipe
        processor = getattr(pipe, "image_processor", None) or getattr(pipe, "video_processor", None)
        processor = processor or VaeImageProcessor(self.factor)
        made = []
        for clip in clips:  # one by one: memory for one, however many are asked for
            pixels = processor.preprocess(list(clip))  # (frames, 3, height, width)
            if pixels.shape[-2:] != (height, width):
                raise UserError(
                    f"images of {width} x {height} pixels, but {self.call.folder} draws multiples of "
                    f"{2 * self.factor}; set data.images.step"
                )
            pixels = pixels.to(self.device, pipe.vae.dtype)
            pixels = pixels.transpose(0, 1)[None] if len(layout.shape) == 4 else pixels
            made.append(mean_of(pipe.vae.encode(pixels)).float().cpu())
        latents = torch.cat(made)
        if latents.shape[1:] != layout.shape:
            raise UserError(
                f"{self.call.folder}: for {frames} x {height} x {width} pixels its VAE makes latents of "
                f"{tuple(latents.shape[1:])}, but reads {tuple(layout.shape)}"
            )
        return latents

    def no_latents(self, size: Size) -> Tensor:
        """What stands in the place of an image's latents where there is none: no channels, (0[, F], H, W).

        Raises:
            UserError: the pipeline does not draw at this size.
        """
        return torch.empty(0, *self.layouts.to_vae(size).shape[1:])

    def prompt(self, caption: str, size: Size, source: Image.Image | None = None, guidance: float = 1.0) -> Prompt:
        """What the pipeline makes of a caption, and of a source image; float32 on the CPU."""
        found = self.call.encode(caption, size, source, guidance)
        return found.to(torch.float32, "cpu")

    def longer(self, captions: Sequence[str]) -> int:
        """How many of the captions have more tokens than the pipeline reads."""
        pipe, limit = self.call.pipe, self.call.options.get("max_sequence_length")
        every = (getattr(pipe, name, None) for name in ("tokenizer_3", "tokenizer_2", "tokenizer"))
        # CLIP's come first and read less.
        tokenizer = next((each for each in every if isinstance(each, PreTrainedTokenizerBase)), None)
        if tokenizer is None:
            return 0
        parameter = self.call.parameters.get("max_sequence_length")
        most = limit or (parameter.default if parameter else None) or tokenizer.model_max_length
        return sum(len(tokenizer(text, verbose=False).input_ids) > most for text in captions)

    def texts(self, size: Size) -> bytes:
        """What all samples share, as a file; see `Texts`.

        Raises:
            UserError: the pipeline cannot be asked, see `pipeline_check`, or joins captions in a way that is not known.
        """
        source = Image.new("RGB", (size.width, size.height)) if self.reads_sources(size) else None
        empty, long = (self.prompt(caption, size, source) for caption in ("", _LONGER))
        check(self.layouts, long, size)
        both = self.call.encode(["", _LONGER], size, source).to(torch.float32, "cpu")
        guided = None
        with suppress(UserError, ValueError):  # else only the whole pipeline can draw with guidance
            guided = self.prompt(_LONGER, size, source, guidance=2.0)
            Guiding.learn(tuple(long.text), tuple(empty.text), tuple(guided.text))
        return Texts.write(empty, long, both, guided)


class Decoder:
    """Latents to images by the pipeline's VAE.

    Args:
        folder: the pipeline; only its VAE is loaded.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
        self.vae = open_pipeline(folder, ("vae",), device, dtype).vae
        self.device = device

    @torch.no_grad()
    def __call__(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Latents as the VAE reads them -> what it makes of them, on the latents' device.

        Args:
            args, kwargs: what the pipeline also gives its VAE.
        """
        given = latents.to(self.device, self.vae.dtype)
        # One by one, as when they are encoded, unless the pipeline says something of each.
        parts = [given] if any(isinstance(each, Tensor) for each in (*args, *kwargs.values())) else given.split(1)
        found = [self.vae.decode(part, *args, **kwargs | {"return_dict": False})[0] for part in parts]
        return torch.cat(found).to(latents.device, torch.float32)


def mean_of(encoded: Any) -> Tensor:
    """The mean of what a VAE says of images."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return next(iter(as_tree(encoded).values()))


def frames_read(call: PipelineCall, size: Size) -> int:
    """How many frames of a clip are encoded: most that the pipeline draws of those there are, and its VAE reads.

    Args:
        call: without weights.
        size: of the clip, with all of its frames.
    """
    return next((n for n in range(size.frames, 1, -1) if _reads(call, replace(size, frames=n))), 1)


def largest(data: Data, call: PipelineCall) -> Size:
    """Of the samples that a recipe reads and draws the one with the most pixels, frames counted.

    Args:
        call: without weights.
    """
    images = data.images
    real = Size(images.size, images.size, images.frames)
    if images.frames > 1:
        real = replace(real, frames=frames_read(call, real))
    return max([real, *map(Size.read, data.sizes)], key=lambda size: size.height * size.width * size.frames)


def _reads(call: PipelineCall, size: Size) -> bool:
    """Whether the VAE makes of so many frames what the pipeline gives it, and of one less it makes less."""
    made = _made_of(call, size)
    if made is None or made == _made_of(call, replace(size, frames=size.frames - 1)):
        return False
    try:
        return made == call.to_vae(size).shape
    except UserError:
        return False


def _made_of(call: PipelineCall, size: Size) -> torch.Size | None:
    """The shape (C, F, H, W) of the latents of a clip, found without weights; None: the VAE refuses it."""
    vae = call.pipe.vae
    try:
        with torch.no_grad(), WithoutWeights():
            clip = torch.zeros(1, 3, size.frames, size.height, size.width, dtype=vae.dtype, device=vae.device)
            return mean_of(vae.encode(clip)).shape[1:]
    except Exception:  # whatever a VAE says to a number of frames
        return None
