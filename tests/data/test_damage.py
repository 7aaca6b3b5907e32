"""Promises of the stream on shards that are damaged: skipped, named, counted, and nothing else moves."""

from __future__ import annotations

import errno
import json
import os
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_ds.data import shards as shards_module
from ppcl_ds.data.index import scan
from ppcl_ds.data.shards import BadSampleError
from ppcl_ds.data.stored import Stored
from ppcl_ds.data.stream import decode
from ppcl_ds.errors import UserError
from tests.data.shards import members, open_stream, read, rewrite, section, write_shards


def nan_latents(name: str, data: bytes) -> tuple[str, bytes]:
    if name != "k1.safetensors":
        return name, data
    stored = Stored.read(data)
    return name, replace(stored, latents=stored.latents * torch.nan).write()


BROKEN = {
    "NaN or infinity": nan_latents,
    "no caption (.txt)": lambda name, data: ("k1.cls" if name == "k1.txt" else name, data),
    "not a name that a sample has": lambda name, data: (name.replace("k1.", "../../x."), data),
    "damaged": lambda name, data: (name, b"\xff" * len(data) if name == "k1.safetensors" else data),
}


@pytest.mark.parametrize("why", BROKEN)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_used_is_skipped_and_named(tmp_path: Path, why: str, workers: int) -> None:
    [path] = write_shards(tmp_path, [20], tall=range(10, 20))
    whole = read(open_stream(section(tmp_path), 2), 10)
    rewrite(path, BROKEN[why])
    stream = open_stream(section(tmp_path, workers=workers), 2)
    seen = read(stream, 10)
    # Its place is taken by another one of its shape; all others are where they were.
    [number] = [number for number, keys in whole.items() if "k1" in keys]
    instead = seen[number][whole[number].index("k1")]
    assert instead in {f"k{number}" for number in range(10)} - {"k1"}
    expected = {number: tuple(instead if key == "k1" else key for key in keys) for number, keys in whole.items()}
    assert seen == expected
    [line] = stream.bad
    assert line.startswith("train-000000.tar:")
    assert why in line
    assert (tmp_path / "bad.log").read_text() == f"{line}\n"
    assert read(open_stream(section(tmp_path, workers=workers), 2), 5, start=2) == {
        number: keys for number, keys in expected.items() if 2 <= number < 7
    }


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_never_crashes_it_and_never_mixes_samples(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        [path] = write_shards(Path(folder), [6])
        whole = path.read_bytes()
        reader = open_stream(section(Path(folder))).decoder
        true = [reader.shards.read(number) for number in range(6)]
        flips = data.draw(st.lists(st.integers(0, 8 * len(whole) - 1), max_size=12))
        damaged = bytearray(whole)
        for bit in flips:
            damaged[bit // 8] ^= 1 << bit % 8
        cut = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
        path.write_bytes(damaged[:cut])
        for number, (name, parts) in enumerate(true):
            try:
                found, read_parts = reader.shards.read(number)
                reader._decode(number, 0.0)
            except BadSampleError:
                continue
            assert found == name
            assert read_parts.keys() == parts.keys()
            for suffix, content in parts.items():
                wrong = int.from_bytes(content, "big") ^ int.from_bytes(read_parts[suffix], "big")
                assert wrong.bit_count() <= len(flips), "its own bytes, but for the bits that were turned"


def test_a_shard_that_was_cut_gives_what_is_left_of_it(tmp_path: Path) -> None:
    first, _ = write_shards(tmp_path, [4, 4])
    stream = open_stream(section(tmp_path, max_bad_fraction=0.5))
    first.write_bytes(first.read_bytes()[: int(stream.decoder.shards.begins[2]) + 700])
    keys = [key for batch in read(stream, 16).values() for key in batch]
    assert {"k2", "k3"}.isdisjoint(keys)
    assert {"k0", "k1", "k4", "k5", "k6", "k7"} <= set(keys)
    assert len(stream.bad) == 2
    assert all("cut short" in line for line in stream.bad)


def test_too_many_bad_samples_end_it_with_their_list(tmp_path: Path) -> None:
    [path] = write_shards(tmp_path, [40])
    bad = {f"k{number}.txt" for number in (3, 9, 20)}
    rewrite(path, lambda name, data: (name.replace("txt", "cls") if name in bad else name, data))
    assert len(read(open_stream(section(tmp_path, max_bad_fraction=0.075)), 80)) == 80
    with pytest.raises(UserError, match=r"3 of 40 samples cannot be used, more than data.max_bad_fraction") as fault:
        read(open_stream(section(tmp_path)), 80)
    for key in ("k3", "k9", "k20"):
        assert f"train-000000.tar:{key}: no caption (.txt)" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_bucket_without_a_usable_sample_is_said_to_be_so(tmp_path: Path) -> None:
    [path] = write_shards(tmp_path, [30], tall=[5])
    rewrite(path, lambda name, data: (name.replace("5.txt", "5.cls"), data))
    with pytest.raises(UserError, match=r"no sample of shape 1x4x2 can be used; train-000000.tar:k5: no caption"):
        read(open_stream(section(tmp_path, max_bad_fraction=0.5)), 30)


def said(words: dict[str, str]) -> dict[str, str]:
    """Words as they stand in a file."""
    return {"words": json.dumps(words)}


def test_a_sample_that_lacks_a_part_is_refused() -> None:
    whole = members(1)["safetensors"]
    parts = {"safetensors": whole, "txt": b"a"}
    assert decode("s:k", parts, 0.99, "1x2x2").caption == "a"
    tensors = safetensors.torch.load(whole)
    words = json.loads(json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]["words"])

    def without(name: str) -> bytes:
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        return safetensors.torch.save(left, said({key: word for key, word in words.items() if key != name}))

    for name, why in (
        ("latents", "^no tensor `latents`"),
        ("size", "^no tensor `size`"),
        ("text", "^no tensor `text`"),
        ("text.1", "its text cannot be put together"),
    ):
        assert name in {**tensors, **words}
        with pytest.raises(ValueError, match=why):
            decode("s:k", parts | {"safetensors": without(name)})
    for word in ("", "[]", "{}", json.dumps({"tree": "{}", "source": None}), json.dumps({"source": [1, 2]})):
        with pytest.raises(ValueError, match="its text cannot be put together"):
            decode("s:k", parts | {"safetensors": safetensors.torch.save(tensors, said({"text": word}))})
    with pytest.raises(ValueError, match="latents of shape 1x2x2, not 1x4x2"):
        decode("s:k", parts, 0.0, "1x4x2")
    with pytest.raises(ValueError, match="damaged"):
        decode("shard:key", parts | {"json": b"[" * 10**5})
    with pytest.raises(ValueError, match="damaged"):
        decode("shard:key", parts | {"safetensors": whole[: len(whole) // 2]})
    for suffix in parts:
        with pytest.raises(ValueError, match=f"^no .{suffix}$"):
            decode("s:k", {name: data for name, data in parts.items() if name != suffix})


def test_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("café.png", "café.txt", "li\nne.png"):
            tar.addfile(tarfile.TarInfo(name))
    with path.open("rb") as file:
        found, problems = scan(file)
    assert [member.key for member in found] == ["caf\\udce9"]
    assert problems == ["li\\nne: no caption (.txt or .json)"]


def test_a_read_that_fails_once_costs_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "WAITS", (0.01, 0.01))
    write_shards(tmp_path, [4])
    whole = read(open_stream(section(tmp_path)), 4)
    pread, calls = os.pread, []

    def stale_at_first(*arguments: int) -> bytes:
        calls.append(arguments)
        if len(calls) % 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", stale_at_first)
    stream = open_stream(section(tmp_path, max_bad_fraction=0))
    assert read(stream, 4) == whole
    assert not stream.bad


def test_a_cache_that_is_too_small_for_a_shard_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    with pytest.raises(UserError, match=r"data.cache is 1000 bytes, but one shard alone takes"):
        open_stream(section(tmp_path, address="pipe:cat {name}", cache=1000))
