"""What is asked of a teacher: sizes, encoded captions, and samples that lie encoded on disk.

Shapes: B samples, C latent channels, F latent frames, H and W latent height and width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.data.text import Tree


@dataclass(frozen=True)
class Size:
    """What a sample is asked for as: pixels, frames of a clip, and width and height of the source image, if any."""

    height: int
    width: int
    frames: int = 1
    source: tuple[int, int] | None = None

    @classmethod
    def read(cls, text: str) -> Size:
        """Height x width, and x frames of a clip, as in `480x832x81`; one number for both sides of a square.

        Raises:
            ValueError: it is something else.
        """
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", text):
            raise ValueError(f"{text} is no size; give a number of pixels, 768x1344, or 480x832x81 with frames")
        height, width, frames = [*map(int, text.split("x")), 0, 0][:3]
        return cls(height, width or height, frames or 1)

    def __str__(self) -> str:
        return "x".join(map(str, (self.height, self.width, *([self.frames] if self.frames > 1 else ()))))


@dataclass(frozen=True)
class Prompt:
    """What a pipeline made of a caption, and of a source image if it takes one, when the data were encoded.

    Attributes:
        text: what `encode_prompt` returned, call by call.
        images: what the VAE and `encode_image` made of the source, call by call.
        source: its width and height in pixels.
    """

    text: Sequence[Tree]
    images: Sequence[Tree] = ()
    source: tuple[int, int] | None = None

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Prompt:
        """The same with floats of a dtype, on a device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        text, images = pytree.tree_map_only(Tensor, moved, (tuple(self.text), tuple(self.images)))
        return replace(self, text=text, images=images)

    def tensors(self) -> list[Tensor]:
        """All that is in it."""
        return [leaf for leaf in pytree.tree_leaves((self.text, self.images)) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Sample:
    """One encoded pair of an image, or a clip, and a caption.

    Attributes:
        latents: (1, C, H, W) or (1, C, F, H, W) float, clean: the mean of what the VAE says, as it says it.
        caption: as it was before it was encoded.
        empty: what the empty caption became beside this sample's source image; None: the same for all samples.
    """

    key: str
    latents: Tensor
    size: Size
    prompt: Prompt
    caption: str
    empty: Prompt | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch of samples of one size."""

    samples: tuple[Sample, ...]

    @property
    def size(self) -> Size:
        return self.samples[0].size

    @property
    def captions(self) -> list[str]:
        return [sample.caption for sample in self.samples]

    @property
    def latents(self) -> Tensor:
        """(B, C, H, W) or (B, C, F, H, W) float, clean, as the VAE says them."""
        return torch.cat([sample.latents for sample in self.samples])

    def drop_captions(
        self, empty: Callable[[Sample], Prompt], share: float, generator: torch.Generator, paired: bool = False
    ) -> tuple[Batch, Tensor]:
        """Replace each caption by the empty one with probability `share`.

        Args:
            empty: what the empty caption becomes beside a sample.
            generator: CPU generator; B numbers are drawn from it.
            paired: whether what has lost its caption becomes the twin, without caption, of a sample that has its own;
                each of these in turn.

        Returns:
            The batch, and for each sample the place of its twin, (B,) int64; without one, its own place.
        """
        dropped = (torch.rand(len(self.samples), generator=generator) < share).tolist()
        places = range(len(dropped))
        captioned = cycle([place for place in places if not dropped[place]])
        twins = [next(captioned, place) if paired and dropped[place] else place for place in places]
        samples = [self.samples[twin] for twin in twins]
        pairs = zip(samples, dropped, strict=True)
        left = tuple(replace(each, prompt=empty(each)) if drop else each for each, drop in pairs)
        return Batch(left), torch.tensor(twins)
