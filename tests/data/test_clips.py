"""Clips become the frames that a viewer shows, or are refused in one line."""

from __future__ import annotations

import builtins
import itertools
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from ppcl_ds.data import clips
from tests.clips import LOSSLESS, noise, write_clip

KINDS: dict[str, Any] = {
    "mkv": LOSSLESS,
    "mp4": {"codec": "libx264"},
    "mov": {"codec": "mpeg4"},
    "webm": {"codec": "libvpx-vp9"},
}
EVERY = pytest.mark.parametrize("suffix", KINDS)


def smooth(frames: int) -> list[Image.Image]:
    """What every codec keeps: each frame of one colour."""
    return [Image.new("RGB", (32, 16), (20 * number + 40, 128, 220 - 20 * number)) for number in range(frames)]


@EVERY
def test_frames_come_in_order_as_they_were(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    given = smooth(9)
    write_clip(path, given, **KINDS[suffix])
    found = list(clips.decode(path.read_bytes()))
    assert len(found) == 9
    for own, frame in zip(found, given, strict=True):
        assert own.mode == "RGB"
        assert np.abs(np.asarray(own, int) - np.asarray(frame, int)).max() <= (0 if suffix == "mkv" else 6)
    head = clips.header(path.read_bytes())
    assert (head.width, head.height, head.frames) == (32, 16, 9)
    assert head.mode == KINDS[suffix].get("pix_fmt", "yuv420p")


def test_only_frames_that_are_asked_for_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    given = noise(9)
    write_clip(path, given, **LOSSLESS)
    data = path.read_bytes()
    damaged = data[: int(len(data) * 0.9)]
    found = list(itertools.islice(clips.decode(damaged), 5))
    assert [frame.tobytes() for frame in found] == [frame.tobytes() for frame in given[:5]]


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="PyAV cannot write such a clip")
def test_a_phone_held_upright(tmp_path: Path) -> None:
    [given] = noise(1, 32, 16)
    path = tmp_path / "a.mov"
    write_clip(path, [given.resize((32, 16))] * 2, codec="png", pix_fmt="rgb24", turned=90)
    found = next(clips.decode(path.read_bytes()))
    assert found.tobytes() == given.transpose(Image.Transpose.ROTATE_90).tobytes()


@EVERY
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_clip_that_is_cut_short_is_known_by_its_header(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    write_clip(path, noise(9), **KINDS[suffix])
    data = path.read_bytes()
    with pytest.raises(ValueError, match=r"is cut short|cannot be decoded: Invalid data found"):
        clips.header(data[: int(len(data) * share)])


@EVERY
def test_any_damage_is_a_value_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    write_clip(path, noise(5), **KINDS[suffix])
    data = path.read_bytes()
    refused: list[str] = []
    for start in range(0, len(data), max(1, len(data) // 40)):
        broken = bytearray(data)
        broken[start : start + 24] = bytes(255 - byte for byte in broken[start : start + 24])
        try:
            clips.header(bytes(broken))
            assert all(frame.mode == "RGB" for frame in clips.decode(bytes(broken)))
        except ValueError as fault:
            refused.append(str(fault))
    assert refused
    assert not any("\n" in line for line in refused)


def test_sound_alone_and_no_clip_at_all_are_refused() -> None:
    for data in (b"", b"no clip", bytes(5000)):
        for read in (clips.header, lambda data: list(clips.decode(data))):
            with pytest.raises(ValueError, match="cannot be decoded: Invalid data found"):
                read(data)


def test_without_pyav_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'ppcl-ds\[video\]'"):
        clips.header(b"any")
