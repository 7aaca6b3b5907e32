"""Samples of a raw shard through the pipeline's encoders, one by one, in stored order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from PIL import Image
from torch import Tensor

from data_tools.samples import SOURCE, caption_parts, captions_of, frames_of, image_suffix
from ppcl_ds.data.batch import Size
from ppcl_ds.data.clips import is_clip
from ppcl_ds.data.images import Buckets
from ppcl_ds.data.index import SIZE, Member
from ppcl_ds.data.stored import EMPTY, Stored
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.encoding import Encoder


@dataclass
class Item:
    """A sample, encoded or not.

    Attributes:
        name: `shard:key`.
        parts: what will be stored.
        why: what speaks against the sample.
    """

    key: str
    name: str
    parts: dict[str, bytes] = field(default_factory=dict)
    why: str = ""


@dataclass
class Coder:
    """A pipeline's encoders at work on the samples of a shard.

    Args:
        frames: `data.images.frames`.
    """

    encoder: Encoder
    buckets: Buckets
    frames: int
    keep_images: bool
    longer: int = 0
    """Captions so far that are longer than the encoder reads."""

    def items(self, stored: Iterable[tuple[Member, dict[str, bytes]]], shard_name: str) -> Iterator[Item]:
        """Samples in stored order, encoded, or with what speaks against it.

        Raises:
            UserError: there is a clip, and the pipeline draws none, or the recipe asks for none.
        """
        for member, parts in stored:
            item = Item(member.key, f"{shard_name}:{member.key}")
            try:
                self._encode(item, parts)
            except ValueError as fault:
                item.why = str(fault)
            yield item

    def _encode(self, item: Item, parts: dict[str, bytes]) -> None:
        """Give a sample what will be stored.

        Raises:
            ValueError: it cannot be used; the message says why.
        """
        captions = captions_of(parts)
        clip = [] if SIZE in parts else self._fitted(parts, image_suffix(parts), item.name)
        size = self._asked_for(parts[SIZE]) if SIZE in parts else Size(clip[0].height, clip[0].width, len(clip))
        size = Size(size.height, size.width, self.encoder.frames(size))
        source = None
        if self.encoder.reads_sources(size):
            suffix = image_suffix(parts, SOURCE)
            source = clip[0] if clip and not suffix else self._fitted(parts, suffix, item.name)[0]
        latents = self.encoder.latents([clip[: size.frames]])[0] if clip else self.encoder.no_latents(size)
        self.longer += self.encoder.longer([text.strip() for text in captions.values()])
        prompts = {
            "" if not place else name: self.encoder.prompt(text.strip(), size, source)
            for place, (name, text) in enumerate(captions.items())
        }
        if source is not None:
            prompts[EMPTY] = self.encoder.prompt("", size, source)
        bad = [name or "caption" for name, prompt in prompts.items() if not _finite(*prompt.tensors())]
        if bad or not _finite(latents):
            raise ValueError(f"NaN or infinity in its {', '.join(['latents'] if not _finite(latents) else bad)}")
        kept = [image_suffix(parts), image_suffix(parts, SOURCE)] if self.keep_images else []
        item.parts = caption_parts(captions) | {suffix: parts[suffix] for suffix in kept if suffix}
        item.parts["safetensors"] = Stored(latents, size, prompts).write()

    def _asked_for(self, size: bytes) -> Size:
        """The size at which a caption without an image is drawn.

        Raises:
            UserError: the pipeline does not draw at it.
        """
        asked = Size.read(size.decode())
        if asked.frames > 1 and (fits := self.encoder.frames(asked)) != asked.frames:
            raise UserError(f"data.sizes: {asked}: the pipeline draws {fits} frames, not {asked.frames}")
        return asked

    def _fitted(self, parts: dict[str, bytes], suffix: str, name: str) -> list[Image.Image]:
        """The first frames of a clip, or an image, at their bucket's size."""
        if not suffix:
            raise ValueError("it has no image")
        if is_clip(suffix):
            pipe = self.encoder.call
            if not pipe.draws_clips:
                raise UserError(f"{name} is a clip (.{suffix}), but {type(pipe.pipe).__name__} draws images")
            if self.frames == 1:
                raise UserError(f"{name} is a clip (.{suffix}); set data.images.frames to the most frames of a clip")
        return [self.buckets.fit(frame) for frame in islice(frames_of(parts, suffix), self.frames)]


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
