"""Promises of `ppcl-data encode`, made through the command itself."""

from __future__ import annotations

import io
import json
import shutil
import socket
import struct
import tarfile
import zlib
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from data_tools import encode, work
from data_tools.samples import tensor_shapes
from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.stored import Stored
from ppcl_ds.data.stream import MicroBatchStream, read_texts
from ppcl_ds.demo.pipeline import WordTable
from ppcl_ds.recipe import load_recipe
from ppcl_ds.sections import Data
from ppcl_ds.teacher.encoding import Encoder
from tests.data_tools.conftest import (
    COUNT,
    Command,
    abandon,
    index_of,
    make_teacher,
    members,
    png,
    tree,
    write_recipe,
    write_tar,
)


def section(project: Path) -> Data:
    return load_recipe(project / "recipe.yaml").data


def stream(project: Path, micro_batch: int = 1) -> MicroBatchStream:
    return MicroBatchStream(section(project), "train", micro_batch, 0, project / "bad.log")


def stored_of(folder: Path) -> dict[str, Stored]:
    """What is stored of every sample, by key."""
    return {
        name.removesuffix(".safetensors"): Stored.read(data)
        for name, data in members(folder).items()
        if name.endswith(".safetensors")
    }


def assert_says(prompt: Prompt, table: WordTable, caption: str) -> None:
    """That a prompt is what the pipeline's table of words makes of a caption; it returns no mask of one."""
    [(embeds, mask)] = prompt.text
    assert mask is None
    assert torch.equal(embeds, table([caption]).embeds)


def test_encoded_samples_are_what_the_encoders_say(project: Path, ppcl_data: Command) -> None:
    (project / "images" / "part 0" / "000.v1.txt").write_text("the first of all numbers")
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    stored = members(project / "shards" / "encoded")
    pixels = np.asarray(Image.open(project / "images" / "part 0" / "000.v1.png"), dtype=np.float32)
    data = stored["part_0_000_v1.safetensors"]
    tensors = safetensors.torch.load(data)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.int64}
    sample = Stored.read(data)
    assert stored["part_0_000_v1.txt"] == b"the first of all numbers"
    assert sample.size == Size(8, 8)
    latents = torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1)
    torch.testing.assert_close(sample.latents, latents, atol=2**-8, rtol=0)
    assert sample.prompts.keys() == {""}
    assert_says(sample.prompts[""], WordTable(6), "the first of all numbers")
    shorter = Stored.read(stored["part_1_001_v1.safetensors"]).prompts[""]
    assert shorter.text[0][0].shape == (1, 2, 6), "a shorter caption of the same shard is stored without padding"
    assert not [name for name in stored if not name.endswith((".txt", ".safetensors"))]


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_the_stream_reads_what_the_commands_wrote(project: Path, ppcl_data: Command, max_tokens: int) -> None:
    shutil.rmtree(project / "teacher")
    make_teacher(project / "teacher", max_tokens=max_tokens)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    table, texts = WordTable(6, max_tokens=max_tokens), read_texts(section(project))
    assert_says(texts.empty, table, "")
    for _, batch in islice(stream(project, 4).take(0, 1), 10):
        assert batch.latents.shape == (4, 3, 8, 8)
        for sample in batch.samples:
            assert_says(sample.prompt, table, f"number {int(sample.key.split('_')[2])}")
            assert sample.empty is None
    lengths = {
        shape[1]
        for name, data in members(project / "shards" / "encoded").items()
        if name.endswith(".safetensors")
        for tensor, shape in tensor_shapes(data).items()
        if tensor == "text.0"
    }
    assert lengths == {2}, "padding is not stored"


def test_all_captions_of_a_sample_are_encoded(tmp_path: Path, ppcl_data: Command) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        (images / f"{number}.png").write_bytes(png(number))
        captions = {"caption_en": f"number {number}", "caption_de": f"die schöne Zahl {number}"}
        (images / f"{number}.json").write_text(json.dumps(captions if number % 2 else {"caption": f"only {number}"}))
    write_recipe(tmp_path, heldout=0.0)
    ppcl_data("shard", tmp_path)
    ppcl_data("encode", tmp_path)
    stored = members(tmp_path / "shards" / "encoded")
    table = WordTable(6)
    for key, sample in stored_of(tmp_path / "shards" / "encoded").items():
        if int(key) % 2:
            # `caption_de` comes first by name, so it is the main one.
            texts = {"": f"die schöne Zahl {key}", "caption_en": f"number {key}"}
            assert json.loads(stored[f"{key}.json"]) == {"caption_de": texts[""], "caption_en": texts["caption_en"]}
        else:
            texts = {"": f"only {key}"}
            assert f"{key}.json" not in stored
        assert stored[f"{key}.txt"].decode() == texts[""]
        assert sample.prompts.keys() == texts.keys()
        for name, text in texts.items():
            assert_says(sample.prompts[name], table, text)
    drawn = {batch.captions[0] for _, batch in islice(stream(tmp_path).take(0, 1), 60)}
    assert {"die schöne Zahl 1", "number 1", "only 2"} <= drawn


def test_pictures_of_many_sizes_lie_in_stored_order_with_their_shapes(tmp_path: Path, ppcl_data: Command) -> None:
    images = tmp_path / "images"
    images.mkdir()
    each, pictures = 4, 12
    for number in range(pictures):
        (images / f"{number}.png").write_bytes(png(number, [(8, 8), (16, 8), (8, 16)][number % 3]))
        (images / f"{number}.txt").write_text(f"number {number}")
    write_recipe(tmp_path, heldout=0.0, samples_per_shard=1000, images={"size": 8, "max_aspect": 2.0})
    ppcl_data("shard", tmp_path)
    ppcl_data("encode", tmp_path)
    raw = members(tmp_path / "shards" / "raw")
    stored = stored_of(tmp_path / "shards" / "encoded")
    assert list(stored) == [name.removesuffix(".txt") for name in raw if name.endswith(".txt")]
    (entry,) = index_of(tmp_path / "shards" / "encoded")["shards"]
    assert sorted(number for numbers in entry["shapes"].values() for number in numbers) == list(range(pictures))
    for shape, numbers in entry["shapes"].items():
        for number in numbers:
            key, sample = list(stored.items())[number]
            assert "x".join(map(str, sample.latents.shape)) == shape
            assert sample.size == Size(*sample.latents.shape[1:])
            assert float(sample.latents[0, 0, 0]) == pytest.approx(int(key) / 127.5 - 1, abs=1e-2), "its own picture"
    assert {len(numbers) for numbers in entry["shapes"].values()} == {each}


def test_images_can_be_kept_beside_their_latents(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    ppcl_data("encode", project, "--keep-images")
    raw, encoded = members(project / "shards" / "raw"), members(project / "shards" / "encoded")
    assert raw.items() <= encoded.items()
    assert len(encoded) == 3 * COUNT
    assert len(next(stream(project).take(0, 1))[1].samples) == 1


def test_photographs_are_encoded_upright(project: Path, ppcl_data: Command) -> None:
    sideways = Image.new("L", (8, 8))
    sideways.paste(255, (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise to look at me"
    sideways.save(project / "images" / "photo.png", exif=exif)
    (project / "images" / "photo.txt").write_text("photo")
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    latents = stored_of(project / "shards" / "encoded")["photo"].latents
    assert (latents[:, :4] == 1).all()
    assert (latents[:, 4:] == -1).all()


def bad_pictures() -> dict[str, bytes]:
    """Files with the header of a picture that cannot be encoded all the same."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    files = {}
    for kind in ("png", "jpg", "webp"):
        file = io.BytesIO()
        noise.save(file, "JPEG" if kind == "jpg" else kind.upper(), **({"lossless": True} if kind == "webp" else {}))
        files[f"cut_{kind}.{kind}"] = file.getvalue()[: len(file.getvalue()) // 2]
    file = io.BytesIO()
    noise.save(file, "GIF", save_all=True, append_images=[noise.rotate(90)])
    files["animated.gif"] = file.getvalue()
    file = io.BytesIO()
    Image.new("F", (8, 8)).save(file, "TIFF")
    files["float.tiff"] = file.getvalue()
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    files["bomb.png"] = b"\x89PNG\r\n\x1a\n" + bomb + struct.pack(">I", 0) + b"IDAT" + b"\x35\xaf\x06\x1e"
    return files


def test_pictures_that_cannot_be_decoded_are_skipped_counted_and_named(project: Path, ppcl_data: Command) -> None:
    for name, data in bad_pictures().items():
        (project / "images" / name).write_bytes(data)
        (project / "images" / name).with_suffix(".txt").write_text("bad")
    write_recipe(project, max_bad_fraction=0.5)
    ppcl_data("shard", project)
    out = ppcl_data("encode", project)
    folder = project / "shards" / "encoded"
    skipped = index_of(folder)["skipped"] + index_of(project / "shards" / "raw")["skipped"]
    for key in ("cut_png", "cut_jpg", "cut_webp", "animated", "float", "bomb"):
        assert any(key in line for line in skipped), (key, skipped)
    assert all("tar:" in line for line in index_of(folder)["skipped"])
    assert f"{len(index_of(folder)['skipped'])} skipped" in out
    assert (folder / "skipped.log").read_text().splitlines() == index_of(folder)["skipped"]
    assert len(stored_of(folder)) == COUNT
    for entry in index_of(folder)["shards"]:
        assert sum(map(len, entry["shapes"].values())) == entry["samples"] == len(entry["offsets"])
    write_recipe(project, max_bad_fraction=0.1)
    (folder / "index.json").unlink()
    error = ppcl_data.fail("encode", project)
    assert "samples cannot be used, more than data.max_bad_fraction (0.1)" in error
    assert not (folder / "index.json").exists()


def test_latents_that_are_not_finite_are_skipped(
    project: Path, ppcl_data: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = Encoder.latents, count()

    def broken(self: Encoder, clips: Any) -> Tensor:
        latents = encode(self, clips)
        if next(calls) % 5 == 2:
            latents[0, 0, 0, 0] = float("nan")
        return latents

    monkeypatch.setattr(Encoder, "latents", broken)
    write_recipe(project, max_bad_fraction=0.5)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    skipped = index_of(project / "shards" / "encoded")["skipped"]
    assert len(skipped) == COUNT // 5
    assert all(line.endswith("NaN or infinity in its latents") for line in skipped)


def test_a_shard_without_any_good_sample_is_left_out(tmp_path: Path, ppcl_data: Command) -> None:
    raw = tmp_path / "shards" / "raw"
    write_tar(raw / "train-000000.tar", {"bad": {"png": bad_pictures()["cut_png.png"], "txt": b"bad"}})
    write_tar(raw / "train-000001.tar", {"good": {"png": png(), "txt": b"good"}})
    ppcl_data("index", raw)
    write_recipe(tmp_path, max_bad_fraction=0.5)
    ppcl_data("encode", tmp_path)
    assert [entry["name"] for entry in index_of(tmp_path / "shards" / "encoded")["shards"]] == ["train-000001.tar"]
    assert "already" in ppcl_data("encode", tmp_path)
    assert [path.name for path in (tmp_path / "shards" / "encoded").glob("*.tar")] == ["train-000001.tar"]


def test_a_changed_recipe_or_a_lost_shard_is_noticed(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    make_teacher(project / "other", width=10)
    teacher = {"path": str(project / "other")}
    write_recipe(project, teacher=teacher)
    assert "already" in ppcl_data("shard", project)
    ppcl_data("encode", project)
    encoded = project / "shards" / "encoded"
    assert next(stream(project).take(0, 1))[1].samples[0].prompt.text[0][0].shape[-1] == 10
    assert read_texts(section(project)).empty.text[0][0].shape[-1] == 10
    lost = next(encoded.glob("train-*.tar"))
    before = {path: path.stat().st_mtime_ns for path in encoded.glob("*.tar") if path != lost}
    lost.unlink()
    ppcl_data("encode", project)
    assert lost.is_file()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    write_recipe(project, teacher=teacher, samples_per_shard=3)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    assert max(entry["samples"] for entry in index_of(encoded)["shards"]) == 3
    write_recipe(project, teacher=teacher, samples_per_shard=100)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    assert len(list(encoded.glob("*.tar"))) == 2, "shards of earlier settings do not stay"
    assert len(list((encoded / "entries").iterdir())) == 3


def test_only_a_changed_raw_shard_is_encoded_again(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    encoded = project / "shards" / "encoded"
    before = {path.name: path.stat().st_mtime_ns for path in encoded.glob("*.tar")}
    (project / "images" / "part 0" / "000.v1.txt").write_text("another caption")
    shutil.rmtree(project / "shards" / "raw")
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    after = {path.name: path.stat().st_mtime_ns for path in encoded.glob("*.tar")}
    assert len([name for name in before if after[name] != before[name]]) == 1
    assert members(encoded)["part_0_000_v1.txt"] == b"another caption"


def test_a_damaged_raw_shard_is_named_and_made_again(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    shard = project / "shards" / "raw" / "train-000000.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        third_sample = tar.getmembers()[4].offset
    shard.write_bytes(whole[:third_sample])
    assert f"{shard} is missing or cut short; run `ppcl-data shard RECIPE`" in ppcl_data.fail("encode", project)
    shard.write_bytes(whole[:third_sample] + bytes(512) + whole[third_sample + 512 :])
    assert f"{shard} holds 7 samples, its index says 8" in ppcl_data.fail("encode", project)
    flipped = bytearray(whole)
    flipped[600] ^= 1
    shard.write_bytes(flipped)
    assert f"{shard} has changed since it was written" in ppcl_data.fail("encode", project)
    shard.unlink()
    assert f"{shard} is missing" in ppcl_data.fail("encode", project)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    assert shard.read_bytes() == whole


def test_odd_names_of_files_and_folders_are_harmless(project: Path, ppcl_data: Command) -> None:
    folder = project / "100% of: it, #1"
    name = "ünï " + "long " * 40
    Image.new("RGB", (8, 8)).save(project / "images" / f"__{name}__.png")
    (project / "images" / f"__{name}__.txt").write_text("odd")
    write_recipe(project, shards=str(folder), heldout=0.0)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    assert not ppcl_data.run("verify", folder)[0]
    keys = {batch.samples[0].key for _, batch in islice(stream(project).take(0, 1), COUNT + 1)}
    assert f"_{name}__".replace(" ", "_") in keys, "webdataset passes over names that begin with two underscores"


def test_a_folder_of_leftovers_is_tidied(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    expected = tree(project / "shards" / "encoded")
    left = project / "shards" / "encoded" / f"train-000000.tar.{socket.gethostname()}-4194999.partial"
    left.write_bytes(b"half a shard")
    fresh = left.with_name("train-000001.tar.elsewhere-1.partial")
    abandon(left.parent)
    fresh.write_bytes(b"another process is at work")
    (project / "shards" / "encoded" / "index.json").unlink()
    ppcl_data("encode", project)
    assert tree(project / "shards" / "encoded") == expected | {fresh.name: fresh.read_bytes()}
    abandon(fresh.parent)
    assert "already" in ppcl_data("encode", project)
    assert tree(project / "shards" / "encoded") == expected


def test_workers_are_spread_over_the_gpus(monkeypatch: pytest.MonkeyPatch, ppcl_data: Command) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = []
    for number in range(3):
        monkeypatch.setattr(work, "_number", number)
        devices.append(encode._device())
    assert devices == ["cuda:0", "cuda:1", "cuda:0"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert encode._device() == "cuda:1", "torchrun has given it one"


def test_too_little_memory_is_one_line(project: Path, ppcl_data: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Encoder, images: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Encoder, "latents", full)
    ppcl_data("shard", project)
    assert "use fewer `--workers` or a smaller `data.images.size`" in ppcl_data.fail("encode", project)


def test_a_shard_that_another_process_finished_meanwhile_stays(
    project: Path, ppcl_data: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(project, heldout=0.0, samples_per_shard=100)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    encoded = project / "shards" / "encoded"
    entry, shard = encoded / "entries" / "train-000000.tar.json", encoded / "train-000000.tar"
    content, expected, written = entry.read_bytes(), tree(encoded), shard.stat().st_mtime_ns
    entry.unlink()
    write = encode.write_partial

    def late(partial: Path, samples: Any) -> None:
        write(partial, samples)
        entry.write_bytes(content)

    monkeypatch.setattr(encode, "write_partial", late)
    ppcl_data("encode", project)
    assert tree(encoded) == expected
    assert shard.stat().st_mtime_ns == written


@pytest.mark.parametrize(("max_tokens", "longer"), [(4, 3), (6, 1), (7, 0)])
def test_captions_that_are_cut_are_counted(
    tmp_path: Path, ppcl_data: Command, monkeypatch: pytest.MonkeyPatch, max_tokens: int, longer: int
) -> None:
    (tmp_path / "images").mkdir()
    for number, words in enumerate((1, 4, 5, 6, 7)):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
        (tmp_path / "images" / f"{number}.txt").write_text("word " * words)

    def cut(self: Encoder, captions: Sequence[str]) -> int:
        assert all(caption == caption.strip() for caption in captions), "as they are encoded"
        return sum(len(caption.split()) > max_tokens for caption in captions)

    monkeypatch.setattr(Encoder, "longer", cut)  # what it counts is told of in `tests/data/test_encoding.py`
    write_recipe(tmp_path, heldout=0.0, samples_per_shard=2)
    ppcl_data("shard", tmp_path)
    out = ppcl_data("encode", tmp_path)
    assert (f"{longer} captions are longer than the text encoder reads, and were cut" in out) == bool(longer)
    assert ("longer than" in out) == bool(longer)
