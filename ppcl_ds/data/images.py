"""Pictures before they are encoded: bytes to a picture, any mode to RGB, any size to one of a few buckets."""

from __future__ import annotations

import io
from math import log

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ppcl_ds.errors import brief

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded. Not all that PIL can: for some of the others (EPS) it starts another program."""


def decode(data: bytes) -> Image.Image:
    """The picture in the bytes of a PNG, JPEG, WebP, GIF, BMP or TIFF file, all of its pixels loaded.

    Raises:
        ValueError: there is no such picture, it is cut short or damaged, has several frames, or more pixels than
            PIL's `Image.MAX_IMAGE_PIXELS`. No other exception, whatever the bytes.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        # PIL itself only warns up to twice its limit; making an error of its warning would not be safe among threads.
        if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"has {width} x {height} pixels, more than {Image.MAX_IMAGE_PIXELS} in all")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # phones append a preview or a depth map to their still
            raise ValueError(f"has {frames} frames; a still is needed")
        image.load()
    except UnidentifiedImageError:
        raise ValueError(f"is no picture in {', '.join(FORMATS)}") from None
    except ValueError as fault:
        raise ValueError(brief(fault)) from None
    except Exception as fault:  # PIL raises whatever the broken byte led to
        raise ValueError(f"cannot be decoded: {brief(fault)}") from None
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, 8 bits a channel, upright as its EXIF says; what was transparent is white.

    16-bit greys are scaled, not clipped. A new picture; the given one stays as it is.

    Raises:
        ValueError: float pixels, or integers of more than 16 bits, whose white nobody knows; an orientation that
            cannot be read; a mode that PIL cannot convert.
    """
    if image.mode == "F":
        raise ValueError("has float pixels, whose range is unknown; save it with 8 bits a channel")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as fault:  # as many kinds as there are ways to write bad EXIF
        raise ValueError(f"has broken EXIF data: {brief(fault)}") from None
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class Buckets:
    """The sizes that pictures are brought to, so that those of one size can be encoded and trained on together.

    A bucket's sides are multiples of `step`, it has at most `size` x `size` pixels, and its longest side is at most
    `max_aspect` times its shortest. It is the tallest of its width, or the widest of its height, with so many pixels.

    Args:
        size: a multiple of `step`; the square (size, size) is always a bucket.

    Attributes:
        sizes: all buckets as (width, height), in ascending order.
    """

    def __init__(self, size: int, max_aspect: float, step: int) -> None:
        tallest = {
            (side, size * size // (side * step) * step) for side in range(step, int(size * max_aspect) + 1, step)
        }
        within = {(w, h) for w, h in tallest if h and w <= h * max_aspect and h <= w * max_aspect}
        self.sizes = tuple(sorted(within | {(h, w) for w, h in within}))

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the bucket whose aspect ratio is nearest, by its logarithm; the narrower of two alike."""
        return min(self.sizes, key=lambda bucket: (abs(log(width / height) - log(bucket[0] / bucket[1])), bucket))

    def fit(self, image: Image.Image) -> Image.Image:
        """The picture at its nearest bucket's size: scaled until it covers it, the rest cut off on both sides alike.

        A picture of that size already is returned itself.
        """
        bucket = self.nearest(*image.size)
        return image if image.size == bucket else ImageOps.fit(image, bucket, Image.Resampling.LANCZOS)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of up to 16 bits in mode "L"."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise ValueError("has more than 16 bits a pixel, whose range is unknown; save it with 8 bits a channel")
    scaled = ((grey + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257
    scaled[grey == image.info.get("transparency")] = 255
    return Image.fromarray(scaled)
