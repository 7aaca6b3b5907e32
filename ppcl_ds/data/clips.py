"""Clips before they are encoded: bytes to frames, by PyAV or from a tar of images, and what their headers say."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from ppcl_ds.data import images
from ppcl_ds.data.index import CLIP_SUFFIXES
from ppcl_ds.errors import brief

_LACKING = 0.1
"""Seconds by which a clip may end before its header says so; muxers round."""


FRAME = "frames/"
"""With its name behind it, a frame of a clip that is not packed yet; together they become the clip's `frames`."""


class Header(NamedTuple):
    """What is known of a clip without its pixels; width and height as stored, not yet turned."""

    width: int
    height: int
    mode: str
    frames: int


def is_clip(suffix: str) -> bool:
    """Whether a member of that suffix is a clip."""
    return suffix.rpartition(".")[2] in CLIP_SUFFIXES


def packed(frames: Mapping[str, bytes]) -> bytes:
    """Images as a clip, in this order, their bytes as they are; equal ones give equal bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (name, data) in enumerate(frames.items()):
            entry = tarfile.TarInfo(f"{number:06d}.{name.rpartition('.')[2].lower()}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def _unpacked(data: bytes) -> list[tuple[str, bytes]]:
    """Names and bytes of the images of a clip that is packed; none where it is a file of another kind."""
    if data[257:262] != b"ustar":
        return []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            entries = [(entry.name, tar.extractfile(entry)) for entry in tar]
            return [(name, file.read()) for name, file in entries if file is not None]
    except Exception as fault:  # tarfile raises whatever the broken header led to
        raise ValueError(f"cannot be unpacked: {brief(fault)}") from None


@contextmanager
def _frame(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as fault:
        raise ValueError(f"has a frame {name} that {fault}") from None


def _header_of_frames(frames: list[tuple[str, bytes]]) -> Header:
    sizes = []
    for name, data in frames:
        with _frame(name):
            image = images.open_header(data)
            sizes.append((image.width, image.height, image.mode))
            if sizes[-1][:2] != sizes[0][:2]:
                raise ValueError(f"has {image.width} x {image.height} pixels, not {sizes[0][0]} x {sizes[0][1]}")
    return Header(*sizes[0], len(frames))


def header(data: bytes) -> Header:
    """Size, pixel format and frames of the clip in the bytes of a file; nothing is decoded.

    Raises:
        ValueError: there is none, it is cut short, or PyAV is not installed.
    """
    if stills := _unpacked(data):
        return _header_of_frames(stills)
    frames, end = 0, 0.0
    with _opened(io.BytesIO(data)) as (container, stream):
        for packet in container.demux():
            if packet.pts is None:  # the last of each stream, which holds nothing
                continue
            if packet.is_corrupt:
                raise ValueError("is cut short")
            frames += packet.stream.index == stream.index
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        said = (container.duration or 0) / 1e6
        if end < said - _LACKING:
            raise ValueError(f"is cut short: it ends after {end:.2f} of {said:.2f} seconds")
        return Header(stream.width, stream.height, str(stream.pix_fmt), frames)


def glance(file: BinaryIO) -> Header:
    """What a clip says of itself, little of which is read and nothing checked: for a first look.

    Raises:
        ValueError: as `header`.
    """
    with _opened(file) as (container, stream):
        seconds = (container.duration or 0) / 1e6
        frames = stream.frames or round(seconds * float(stream.average_rate or 0))  # not every container counts them
        return Header(stream.width, stream.height, str(stream.pix_fmt), max(1, frames))


def decode(data: bytes) -> Iterator[Image.Image]:
    """The frames of a clip, RGB, upright, at the clip's own rate; each is decoded when it is asked for.

    Raises:
        ValueError: there is none, it is damaged, or PyAV is not installed.
    """
    stills = _unpacked(data)
    for name, still in stills:
        with _frame(name):
            yield images.as_rgb(images.decode(still))
    if stills:
        return
    with _opened(io.BytesIO(data)) as (container, stream):
        stream.codec_context.options = {"err_detect": "crccheck+explode"}  # rather than guess what is lost
        number = -1
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise ValueError(f"is damaged at frame {number}")
            image = frame.to_image()
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
        if number < 0:
            raise ValueError("has no frames")


@contextmanager
def _opened(file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    """The container and its video; whatever PyAV raises becomes a ValueError of one line."""
    try:
        import av
    except ImportError:
        raise ValueError("is read where PyAV is installed: pip install 'ppcl-ds[video]'") from None
    try:
        with av.open(file) as container:
            if not container.streams.video:
                raise ValueError("has no video in it")
            yield container, container.streams.video[0]
    except av.FFmpegError as fault:
        raise ValueError(f"cannot be decoded: {fault.strerror}") from None
    except ValueError:
        raise
    except Exception as fault:  # whatever the broken byte led to
        raise ValueError(f"cannot be decoded: {brief(fault)}") from None
