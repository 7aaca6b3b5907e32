"""Images before they are encoded: bytes to an image, any mode and colour profile to sRGB, any size to a bucket."""

from __future__ import annotations

import functools
import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from math import log

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features

from ppcl_ds.errors import brief

_OPTIONAL = {"HEIF": ("heic", "pillow_heif", "pillow-heif"), "JXL": ("jxl", "pillow_jxl", "pillow-jxl-plugin")}
"""Formats that Pillow reads with another package's help: suffix, module and name of the package."""

_BRANDS = {b"ftypavif": "AVIF", b"ftypavis": "AVIF", b"JXL ": "JXL"} | {
    b"ftyp" + brand: "HEIF" for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
}
"""What stands at byte 4 of such files."""


@functools.cache
def formats() -> tuple[str, ...]:
    """What is decoded here. Not all that PIL can: for some of the others (EPS) it starts another program."""
    known = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
    if features.check("avif"):
        known.append("AVIF")
    for name, (_, module, _) in _OPTIONAL.items():
        try:
            package = importlib.import_module(module)
        except Exception:  # missing, or broken in whatever way
            continue
        getattr(package, "register_heif_opener", lambda: None)()
        known.append(name)
    return tuple(known)


def unknown(data: bytes) -> str:
    """Why nothing here can read the bytes."""
    kind = "JXL" if data.startswith(b"\xff\x0a") else _BRANDS.get(data[4:12], _BRANDS.get(data[4:8], ""))
    if not kind or kind in formats():
        return f"is no image in {', '.join(formats())}"
    suffix, _, package = _OPTIONAL.get(kind, ("avif", "", "a newer Pillow"))
    return f"is in {kind} format (.{suffix}), which is read where {package} is installed"


@contextmanager
def _as_value_error(what: str) -> Iterator[None]:
    """Whatever PIL raises, which depends on the broken byte, as a ValueError of one line."""
    try:
        yield
    except ValueError as fault:
        raise ValueError(brief(fault)) from None
    except Exception as fault:
        raise ValueError(f"{what}: {brief(fault)}") from None


def open_header(data: bytes) -> Image.Image:
    """The image in the bytes of a file, its header alone read.

    Raises:
        ValueError: there is none. No other exception, whatever the bytes.
    """
    with _as_value_error("cannot be read"):
        try:
            return Image.open(io.BytesIO(data), formats=formats())
        except UnidentifiedImageError:
            raise ValueError(unknown(data)) from None


def decode(data: bytes) -> Image.Image:
    """The image in the bytes of a file of one of the `formats`, all of its pixels loaded.

    Raises:
        ValueError: there is no such image, it is cut short or damaged, has several frames, or more pixels than
            PIL's `Image.MAX_IMAGE_PIXELS`. No other exception, whatever the bytes.
    """
    image = open_header(data)
    with _as_value_error("cannot be decoded"):
        width, height = image.size
        # PIL itself only warns up to twice its limit; making an error of its warning would not be safe among threads.
        if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"has {width} x {height} pixels, more than {Image.MAX_IMAGE_PIXELS} in all")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # phones append a preview or a depth map to their still
            raise ValueError(f"has {frames} frames; a still is needed")
        image.load()
    return image


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says.

    Raises:
        ValueError: the EXIF is broken.
    """
    with _as_value_error("has broken EXIF data"):
        return ImageOps.exif_transpose(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in sRGB, 8 bits a channel, upright as its EXIF says; what was transparent is white.

    Colours are converted by the image's own ICC profile, if it has one. 16-bit greys are scaled, not clipped. A new
    image, without a profile; the given one stays as it is.

    Raises:
        ValueError: float pixels, or integers of more than 16 bits, whose white nobody knows; an orientation or a colour
            profile that cannot be read or does not fit the pixels; a mode that PIL cannot convert.
    """
    if image.mode == "F":
        raise ValueError("has float pixels, whose range is unknown; save it with 8 bits a channel")
    image = upright(image)
    with _as_value_error("cannot be converted to RGB"):
        profile = image.info.get("icc_profile")
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        alpha = None
        opaque = image.mode == "LAB" or not {"A", "a"} & set(image.getbands())  # Lab has an A that is a colour
        if not opaque or "transparency" in image.info:
            transparent = image.convert("RGBA")
            alpha, image = transparent.getchannel("A"), transparent.convert("L" if image.mode == "LA" else "RGB")
        elif image.mode not in ("RGB", "L", "CMYK", "LAB"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        rgb = _in_srgb(image, profile) if profile else image.convert("RGB")
        if alpha is not None:
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
        elif rgb is image:
            rgb = image.copy()
        rgb.info.pop("icc_profile", None)
        return rgb


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An RGB, grey, CMYK or Lab image, whose colours the profile explains, in sRGB."""
    try:
        space = _opened(profile).profile.xcolor_space.strip()
        if space == "RGB" and image.mode == "L":  # a grey image of a program that knows one profile for all
            image = image.convert("RGB")
        if {"GRAY": "L", "Lab": "LAB"}.get(space, space) != image.mode:
            raise ValueError(f"has a colour profile for {space}, but pixels in {image.mode}; remove or replace it")
        return _transform(profile, image.mode).apply(image)
    except (ImageCms.PyCMSError, OSError, TypeError) as fault:
        raise ValueError(f"has a broken colour profile ({brief(fault)})") from None


@functools.lru_cache(maxsize=64)
def _opened(profile: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile))


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    srgb = ImageCms.createProfile("sRGB")
    # A transform with a cache of its own must not be used by several threads.
    return ImageCms.buildTransform(_opened(profile), srgb, mode, "RGB", flags=ImageCms.Flags.NOCACHE)


class Buckets:
    """The sizes that images are brought to, so that those of one size can be encoded and trained on together.

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
        """The image at its nearest bucket's size: scaled until it covers it, the rest cut off on both sides alike.

        An image of that size already is returned itself.
        """
        bucket = self.nearest(*image.size)
        return image if image.size == bucket else ImageOps.fit(image, bucket, Image.Resampling.LANCZOS)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of up to 16 bits in mode "L"."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise ValueError("has more than 16 bits a pixel, whose range is unknown; save it with 8 bits a channel")
    scaled = ((grey + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257
    scaled[grey == image.info.get("transparency")] = 255
    return Image.fromarray(scaled)
