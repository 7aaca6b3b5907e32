"""Promises about pictures before they are encoded: nothing is damaged silently, and buckets fit."""

from __future__ import annotations

import io
import random
import warnings
from itertools import chain
from math import log
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ppcl_ds.data.images import Buckets, as_rgb, decode

RED, WHITE = (200, 10, 20), (255, 255, 255)


def written(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> list[list[tuple[int, ...]]]:
    assert image.mode == "RGB"
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


def noise(width: int = 40, height: int = 30) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_an_opaque_picture_keeps_every_pixel() -> None:
    image = noise()
    assert pixels(as_rgb(decode(written(image, "PNG")))) == pixels(image)
    assert pixels(as_rgb(decode(written(image.convert("RGBA"), "PNG")))) == pixels(image)
    assert pixels(as_rgb(image)) == pixels(image)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_becomes_white(kind: str) -> None:
    image = Image.new("RGBA", (3, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))
    image.putpixel((2, 0), (*RED, 51))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    blended = tuple(round(51 / 255 * colour + 204 / 255 * 255) for colour in RED)
    assert pixels(as_rgb(decode(written(image, kind, **options)))) == [[RED, WHITE, blended]]


def test_a_transparent_grey_becomes_white() -> None:
    image = Image.new("LA", (2, 1), (90, 255))
    image.putpixel((1, 0), (0, 0))
    assert pixels(as_rgb(decode(written(image, "PNG")))) == [[(90, 90, 90), WHITE]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_transparent_palette_colours_become_white(kind: str, transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, 0, 0, 0])
    image.putpixel((1, 0), 1)
    if kind == "GIF":
        transparency = 1
    opened = decode(written(image, kind, transparency=transparency))
    assert opened.mode == "P"
    assert pixels(as_rgb(opened)) == [[RED, WHITE]]


@pytest.mark.parametrize(("mode", "colour", "other"), [("L", 0, 90), ("RGB", (0, 0, 0), (1, 2, 3)), ("1", 0, 1)])
def test_a_colour_that_a_png_calls_transparent_becomes_white(mode: str, colour: Any, other: Any) -> None:
    image = Image.new(mode, (2, 1), other)
    image.putpixel((1, 0), colour)
    opened = decode(written(image, "PNG", transparency=colour))
    assert opened.mode == mode
    assert pixels(as_rgb(opened))[0] == [pixels(image.convert("RGB"))[0][0], WHITE]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "RGB"])
def test_every_mode_of_jpeg_keeps_its_colours(mode: str) -> None:
    image = Image.new("RGB", (16, 16), (200, 40, 90)).convert(mode)
    opened = decode(written(image, "JPEG", quality=100))
    np.testing.assert_allclose(np.asarray(as_rgb(opened)), np.asarray(image.convert("RGB")), atol=3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greys_are_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32896, 65278, 65535]], dtype=np.uint16)
    opened = decode(written(Image.fromarray(values), kind))
    assert opened.mode.startswith("I")
    assert [pixel[0] for pixel in pixels(as_rgb(opened))[0]] == [0, 0, 1, 1, 128, 254, 255]
    assert pixels(as_rgb(opened.convert("I"))) == pixels(as_rgb(opened))
    assert pixels(as_rgb(Image.fromarray(values.astype(">u2")))) == pixels(as_rgb(opened))


def test_the_transparent_value_of_a_16_bit_grey_becomes_white() -> None:
    values = np.array([[1000, 2570]], dtype=np.uint16)
    plain = written(Image.fromarray(values), "PNG")
    opened = decode(written(Image.fromarray(values), "PNG", transparency=1000))
    assert len(plain) < len(written(Image.fromarray(values), "PNG", transparency=1000))
    assert pixels(as_rgb(opened)) == [[WHITE, (10, 10, 10)]]


def test_black_and_white_stays_black_and_white() -> None:
    image = Image.new("1", (2, 1), 1)
    image.putpixel((1, 0), 0)
    for kind in ("PNG", "TIFF", "BMP"):
        assert pixels(as_rgb(decode(written(image, kind)))) == [[WHITE, (0, 0, 0)]]


@pytest.mark.parametrize(("values", "why"), [([[0.5]], "float pixels"), ([[70000]], "more than 16 bits")])
def test_pixels_whose_white_nobody_knows_are_refused(values: list[list[float]], why: str) -> None:
    array = np.array(values, dtype=np.float32 if why == "float pixels" else np.int32)
    opened = decode(written(Image.fromarray(array), "TIFF"))
    with pytest.raises(ValueError, match=why):
        as_rgb(opened)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright_and_are_turned_once_only(kind: str, orientation: int) -> None:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    lying = noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    every: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    options = every.get(kind, {})
    opened = decode(written(lying, kind, exif=exif, **options))
    upright = lying.transpose(turns[orientation]) if orientation in turns else lying
    turned = as_rgb(opened)
    np.testing.assert_allclose(np.asarray(turned).astype(int), np.asarray(upright).astype(int), atol=12)
    assert pixels(as_rgb(turned)) == pixels(turned)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_are_refused_with_their_frames_counted(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (20 * number, 0, 0)) for number in range(12)]
    moving = written(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="has 12 frames; a still is needed"):
        decode(moving)
    assert decode(written(frames[0], kind)).size == (8, 8)


def test_the_still_of_a_phone_is_taken_from_among_its_previews() -> None:
    still = noise(16, 16)
    data = written(still, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))], quality=100, subsampling=0)
    assert decode(data).size == (16, 16)
    np.testing.assert_allclose(np.asarray(as_rgb(decode(data))).astype(int), np.asarray(still).astype(int), atol=12)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated_pictures_are_refused(kind: str, share: float) -> None:
    data = written(noise(), kind)
    with pytest.raises(ValueError, match=r"\w+"):
        decode(data[: int(len(data) * share)])


def test_bytes_that_are_no_picture_are_refused() -> None:
    for data in (b"", b"garbage" * 99, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xff\xd8\xff"):
        with pytest.raises(ValueError, match="no image") as caught:
            decode(data)
        assert "0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_bytes_give_a_picture_or_a_value_error_of_one_line(kind: str) -> None:
    random_bytes = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "camera"
    data = written(noise(8, 6), kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(random_bytes.randint(1, 4)):
            damaged[random_bytes.randrange(min(len(data), 150))] = random_bytes.randrange(256)
        why = "none"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert as_rgb(decode(bytes(damaged))).mode == "RGB"
        except ValueError as fault:
            why = str(fault)
        assert why
        assert "\n" not in why


@pytest.mark.parametrize("limit", [300, 700, 1199])  # PIL: an error, an error, a warning
def test_decompression_bombs_are_refused(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(noise(40, 30), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for strict in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error" if strict else "ignore")
            filters = list(warnings.filters)
            with pytest.raises(ValueError, match="pixels"):
                decode(data)
            assert list(warnings.filters) == filters
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert decode(data).size == (40, 30)


def test_a_picture_without_pixels_is_refused() -> None:
    data = bytearray(written(Image.new("RGB", (1, 1)), "BMP"))
    data[18:22] = bytes(4)  # its width
    with pytest.raises(ValueError, match="no image"):
        decode(bytes(data))


BUCKETS = st.builds(
    lambda step, steps, aspect: (step * steps, aspect, step),
    st.sampled_from([2, 8, 16]),
    st.integers(1, 24),
    st.floats(1, 4),
)


@settings(max_examples=60, deadline=None)
@given(BUCKETS)
def test_buckets_are_the_largest_sizes_within_area_and_aspect(given_as: tuple[int, float, int]) -> None:
    size, aspect, step = given_as
    sizes = Buckets(size, aspect, step).sizes
    assert (size, size) in sizes
    assert len(set(sizes)) == len(sizes)
    for w, h in sizes:
        assert w % step == h % step == 0 < w * h <= size * size
        assert max(w, h) <= aspect * min(w, h)
        assert w * (h + step) > size * size or (w + step) * h > size * size
        assert (h, w) in sizes
    assert len({w / h for w, h in sizes}) == len(sizes), "no two of one aspect ratio, so one is the nearest"
    for w in range(step, 4 * size, step):
        tallest = size * size // w // step * step
        assert ((w, tallest) in sizes) == (tallest > 0 and w <= aspect * tallest and tallest <= aspect * w)


def test_one_square_bucket_without_other_aspects() -> None:
    assert Buckets(1024, 1.0, 16).sizes == ((1024, 1024),)
    assert (1280, 816) in Buckets(1024, 2.0, 16).sizes


@settings(max_examples=60, deadline=None)
@given(BUCKETS, st.integers(1, 4000), st.integers(1, 4000))
def test_the_nearest_bucket_is_the_nearest_by_aspect(given_as: tuple[int, float, int], width: int, height: int) -> None:
    buckets = Buckets(*given_as)
    w, h = buckets.nearest(width, height)
    distance = abs(log(width / height) - log(w / h))
    assert all(distance <= abs(log(width / height) - log(v / u)) for v, u in buckets.sizes)
    assert all(buckets.nearest(*size) == size for size in buckets.sizes)
    assert Buckets(*given_as).nearest(width, height) == (w, h)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90))
def test_every_picture_is_brought_to_a_bucket(width: int, height: int) -> None:
    buckets = Buckets(32, 2.0, 8)
    fitted = buckets.fit(Image.new("RGB", (width, height), RED))
    assert fitted.size == buckets.nearest(width, height)
    assert fitted.mode == "RGB"
    assert set(chain(*pixels(fitted))) == {RED}


def test_a_picture_of_a_buckets_size_is_left_alone() -> None:
    image = noise(48, 16)
    assert Buckets(32, 4.0, 16).fit(image) is image


def test_what_stands_over_is_cut_off_on_both_sides_alike() -> None:
    image = Image.new("RGB", (128, 32), RED)
    image.paste(WHITE, (48, 0, 80, 32))
    assert set(chain(*pixels(Buckets(32, 1.0, 8).fit(image)))) == {WHITE}
    doubled = Buckets(64, 1.0, 8).fit(image)
    assert pixels(doubled)[0] == pixels(doubled)[0][::-1]
    assert doubled.size == (64, 64)
