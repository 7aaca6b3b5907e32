"""Whatever happens to the bytes of a shard, nobody's caption comes with somebody else's picture."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.inspect import inspect
from data_tools.samples import captions_of, header_of, read_parts, tensor_shapes
from data_tools.verify import see
from ppcl_ds.data import images as pictures
from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.index import scan
from ppcl_ds.data.stored import Stored
from tests.data_tools.conftest import png, write_tar

COUNT = 6


def raw(number: int) -> dict[str, bytes]:
    captions = {"caption": f"number {number}", "caption_de": f"Zahl {number}"}
    return {"png": png(number, (4, 4)), "txt": captions["caption"].encode(), "json": json.dumps(captions).encode()}


def encoded(number: int) -> dict[str, bytes]:
    prompt = Prompt(((torch.full((1, 2, 2), float(number)), None),))
    stored = Stored(torch.full((1, 2, 2), float(number)), Size(2, 2), {"": prompt})
    return {"safetensors": stored.write(), "txt": f"number {number}".encode()}


def picture_says(parts: Mapping[str, bytes]) -> int:
    """The number that is in the picture or in the latents."""
    if "safetensors" in parts:
        return int(safetensors.torch.load(parts["safetensors"])["latents"][0, 0, 0])
    return int(np.asarray(pictures.as_rgb(pictures.decode(parts["png"])))[0, 0, 0])


def holds(data: bytes, folder: Path) -> None:
    """Look at damaged bytes in every way; where nothing was flipped inside a content, contents must belong together."""
    path = folder / "train-000000.tar"
    path.write_bytes(data)
    seen = see(path)
    with path.open("rb") as file:
        members, _ = scan(file)
        for member in members:
            parts = read_parts(file, member)
            for look in (lambda parts=parts: captions_of(parts), lambda parts=parts: header_of(parts, "png")):
                try:
                    look()
                except (ValueError, KeyError):
                    continue
            try:
                tensor_shapes(parts.get("safetensors", b""))
            except ValueError:
                continue
    inspect(folder)
    with path.open("rb") as file:
        for member in seen.good:
            parts = read_parts(file, member)
            caption = next(iter(captions_of(parts).values()))
            # A flip may change one of the three; no two of three may name another sample.
            said = [member.key, caption.removeprefix("number "), str(picture_says(parts))]
            others = [name for name in said if name in map(str, range(COUNT))]
            assert max(map(others.count, others)) >= 2, said


@pytest.mark.parametrize("kind", [raw, encoded])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_mixes_samples_or_stops_the_tools(
    kind: Callable[[int], dict[str, bytes]], tmp_path: Path, data: st.DataObject, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "whole.tgz"
    if not path.exists():
        write_tar(path, {str(number): kind(number) for number in range(COUNT)})
    whole = bytearray(path.read_bytes())
    used = len(bytes(whole).rstrip(b"\0"))
    for place in data.draw(st.lists(st.integers(0, used - 1), max_size=4)):
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole))) :]
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, max(len(whole) - 1, 0)))
        del whole[start : start + data.draw(st.sampled_from([1, 100, 512, 1024, 1536]))]
    holds(bytes(whole), tmp_path)
    capsys.readouterr()


@pytest.mark.parametrize("size", [-1, -512, -10240, 2**40, 2**62])
def test_headers_that_lie_about_a_length_are_found(
    tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "whole.tgz", {str(number): raw(number) for number in range(COUNT)})
    whole = bytearray((tmp_path / "whole.tgz").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        offset = tar.getmembers()[4].offset
    header = whole[offset : offset + 512]
    header[124:136] = bytes([255 if size < 0 else 128]) + size.to_bytes(11, "big", signed=size < 0)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    whole[offset : offset + 512] = header
    holds(bytes(whole), tmp_path)
