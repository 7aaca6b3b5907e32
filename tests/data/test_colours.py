"""Promises about colours and formats: pixels are what a viewer shows; nothing that a decoder raises ends a command."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from ppcl_ds.data.images import as_rgb, decode, open_header

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
D50 = (0.9642, 1.0, 0.8249)
PRIMARIES = {  # columns: red, green, blue as XYZ under D50
    "Display P3": ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)),
    "Adobe RGB": ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)),
    "ProPhoto": ((0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0), (0.0313, 0.0001, 0.8249)),
}
GAMMAS = {"Display P3": 2.2, "Adobe RGB": 2.2, "ProPhoto": 1.8}


def tag_xyz(xyz: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in xyz))


def tag_gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2, by the standard's own layout."""
    table, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", *(round(v * 65536) for v in D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def rgb_profile(name: str) -> bytes:
    red, green, blue = PRIMARIES[name]
    curve = tag_gamma(GAMMAS[name])
    return profile(
        b"RGB ",
        {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79), b"wtpt": tag_xyz(D50)}
        | {b"rXYZ": tag_xyz(red), b"gXYZ": tag_xyz(green), b"bXYZ": tag_xyz(blue)}
        | {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve},
    )


def grey_profile(gamma: float) -> bytes:
    desc = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    return profile(b"GRAY", {b"desc": desc, b"wtpt": tag_xyz(D50), b"kTRC": tag_gamma(gamma)})


def by_hand(colour: tuple[int, ...], name: str) -> np.ndarray:
    """What a viewer shows on an sRGB screen, by the profile's own numbers."""
    linear = (np.array(colour) / 255) ** (round(GAMMAS[name] * 256) / 256)
    xyz = linear @ np.array(PRIMARIES[name])
    srgb = np.array(((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7142)))
    light = np.clip(xyz @ np.linalg.inv(srgb), 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055) * 255


def written(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(PRIMARIES)), st.tuples(*[st.integers(0, 255)] * 3), st.sampled_from(["PNG", "TIFF"]))
def test_colours_are_what_a_viewer_shows(name: str, colour: tuple[int, int, int], kind: str) -> None:
    image = as_rgb(decode(written(Image.new("RGB", (2, 2), colour), kind, icc_profile=rgb_profile(name))))
    np.testing.assert_allclose(np.asarray(image)[0, 0], by_hand(colour, name), atol=3)
    assert "icc_profile" not in image.info, "it would be converted twice"


def test_a_saturated_green_of_a_phone_is_not_the_green_of_srgb() -> None:
    image = as_rgb(
        decode(written(Image.new("RGB", (2, 2), (120, 200, 90)), "PNG", icc_profile=rgb_profile("Adobe RGB")))
    )
    assert np.abs(np.asarray(image)[0, 0].astype(int) - (120, 200, 90)).max() > 20


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_srgb_stays_as_it_is(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    every: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    options = every.get(kind, {})
    tagged = as_rgb(decode(written(noise, kind, icc_profile=SRGB, **options)))
    plain = as_rgb(decode(written(noise, kind, **options)))
    np.testing.assert_allclose(np.asarray(tagged).astype(int), np.asarray(plain).astype(int), atol=1)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparency_is_white_and_the_rest_is_converted(mode: str) -> None:
    colour, icc = ((180, 180, 180), grey_profile(1.0)) if mode == "LA" else ((200, 60, 60), rgb_profile("ProPhoto"))
    image = Image.new("RGBA", (2, 1), (*colour, 255))
    image.putpixel((1, 0), (*colour, 0))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    got = np.asarray(as_rgb(decode(written(image, "PNG", icc_profile=icc))))
    if mode == "LA":  # light of 180 / 255, by sRGB's curve
        assert abs(int(got[0, 0, 0]) - 218) <= 2
    else:
        np.testing.assert_allclose(got[0, 0], by_hand(colour, "ProPhoto"), atol=3)
    assert got[0, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("depth", [8, 16])
def test_greys_have_their_own_curve(depth: int) -> None:
    grey = Image.fromarray(np.full((2, 2), 180 if depth == 8 else 180 * 257, np.uint8 if depth == 8 else np.uint16))
    got = np.asarray(as_rgb(decode(written(grey, "PNG", icc_profile=grey_profile(1.0)))))
    assert abs(int(got[0, 0, 0]) - 218) <= 2
    assert np.asarray(as_rgb(decode(written(grey, "PNG"))))[0, 0, 0] == 180
    assert np.asarray(as_rgb(decode(written(grey, "PNG", icc_profile=SRGB))))[0, 0, 0] in (179, 180, 181)


def test_lab_pixels_are_converted() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    red = ImageCms.profileToProfile(
        Image.new("RGB", (2, 2), (200, 60, 60)), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )  # fmt: skip
    assert red is not None
    np.testing.assert_allclose(
        np.asarray(as_rgb(decode(written(red, "TIFF", icc_profile=lab))))[0, 0], (200, 60, 60), atol=4
    )


@pytest.mark.parametrize("icc", [b"x" * 200, SRGB[:150], b"acsp", SRGB[:100] + bytes(300)])
def test_a_broken_profile_is_named(icc: bytes) -> None:
    with pytest.raises(ValueError, match="broken colour profile"):
        as_rgb(decode(written(Image.new("RGB", (2, 2)), "PNG", icc_profile=icc)))


@pytest.mark.parametrize(("mode", "icc"), [("RGB", grey_profile(2.2)), ("CMYK", SRGB)])
def test_a_profile_of_another_colour_space_is_named(mode: str, icc: bytes) -> None:
    with pytest.raises(ValueError, match=f"a colour profile for .*, but pixels in {mode}"):
        as_rgb(decode(written(Image.new(mode, (2, 2)), "JPEG", icc_profile=icc)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_profile_gives_an_image_or_a_value_error_of_one_line(data: st.DataObject) -> None:
    icc = bytearray(rgb_profile("Adobe RGB"))
    for place in data.draw(st.lists(st.integers(0, len(icc) - 1), max_size=6)):
        icc[place] = data.draw(st.integers(0, 255))
    why = "none"
    try:
        image = as_rgb(decode(written(Image.new("RGB", (2, 2), (9, 99, 199)), "PNG", icc_profile=bytes(icc))))
        assert image.mode == "RGB"
    except ValueError as fault:
        why = str(fault)
    assert why
    assert "\n" not in why


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_is_read() -> None:
    got = np.asarray(as_rgb(decode(written(Image.new("RGB", (16, 16), (200, 60, 60)), "AVIF", quality=100))))
    np.testing.assert_allclose(got[8, 8], (200, 60, 60), atol=4)


@pytest.mark.parametrize(
    ("data", "package"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow-heif"),
        (b"\xff\x0a" + b"x" * 40, "pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a", "pillow-jxl-plugin"),
    ],
)
def test_a_format_that_needs_a_package_says_which(data: bytes, package: str) -> None:
    for look in (decode, open_header):
        with pytest.raises(ValueError, match=f"where {package} is installed"):
            look(data)


@pytest.mark.parametrize("raised", [RuntimeError, KeyError, ZeroDivisionError, SyntaxError, AssertionError, EOFError])
def test_whatever_a_decoder_raises_is_a_value_error(raised: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageOps, PngImagePlugin

    data = written(Image.new("RGB", (2, 2)), "PNG")
    image = decode(data)

    def fail(*_: object, **__: object) -> None:
        raise raised("deep inside")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(ValueError, match=r"broken EXIF data: '?deep inside"):
        as_rgb(image)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(ValueError, match=r"cannot be decoded: '?deep inside"):
        decode(data)


def test_profiles_are_converted_by_threads_alike() -> None:
    from concurrent.futures import ThreadPoolExecutor

    colours = np.random.default_rng(1).integers(0, 256, (64, 3))
    files = [
        written(Image.new("RGB", (40, 40), tuple(map(int, colour))), "PNG", icc_profile=rgb_profile("Display P3"))
        for colour in colours
    ]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda data: np.asarray(as_rgb(decode(data)))[3, 3].tolist(), files))
    assert got == [np.asarray(as_rgb(decode(data)))[3, 3].tolist() for data in files]
