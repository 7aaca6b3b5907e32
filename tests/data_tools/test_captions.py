"""Captions are a source without images: each is given a size, and encoded without a VAE."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch

from tests.data_tools.conftest import COUNT, Command, index_of, members, png, write_recipe, write_tar

SIZES = {"8x8": 3.0, "4x8": 1.0}
CAPTIONS = [f"number {number}" for number in range(COUNT * 4)]


def as_text(folder: Path) -> Path:
    path = folder / "captions.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(CAPTIONS).encode())
    return path


def as_jsonl(folder: Path) -> Path:
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps({"caption": caption, "id": 1}) + "\n" for caption in CAPTIONS))
    return path


def as_csv(folder: Path) -> Path:
    path = folder / "captions.csv"
    path.write_text("id,text\n" + "".join(f'1,"{caption}"\n' for caption in CAPTIONS))
    return path


def as_parquet(folder: Path) -> Path:
    path = folder / "captions.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": CAPTIONS}), path)
    return path


def as_tar(folder: Path) -> Path:
    path = folder / "captions.tar"
    write_tar(path, {f"{number:04d}": {"txt": caption.encode()} for number, caption in enumerate(CAPTIONS)})
    return path


@pytest.mark.parametrize("write", [as_text, as_jsonl, as_csv, as_parquet, as_tar])
def test_captions_alone_become_samples(write: Callable[[Path], Path], tmp_path: Path, ppcl_data: Command) -> None:
    """Every caption once, whatever file they stand in; a quarter of them at the size whose weight is a quarter."""
    write_recipe(tmp_path, source=str(write(tmp_path)), sizes=SIZES)
    ppcl_data("shard", tmp_path)
    stored = members(tmp_path / "shards" / "raw")
    assert sorted(text.decode() for name, text in stored.items() if name.endswith(".txt")) == sorted(CAPTIONS)
    sizes = Counter(size.decode() for name, size in stored.items() if name.endswith(".size"))
    assert sizes.keys() == SIZES.keys()
    assert sizes["4x8"] == pytest.approx(len(CAPTIONS) / 4, rel=0.4)


def test_captions_are_encoded_without_the_vae(tmp_path: Path, ppcl_data: Command) -> None:
    """Its weights may even be gone. What has no latents says so by its shape, and `verify` finds nothing wrong."""
    write_recipe(tmp_path, source=str(as_text(tmp_path)), sizes=SIZES)
    for weights in (tmp_path / "teacher" / "vae").glob("*.safetensors"):
        weights.unlink()
    ppcl_data("shard", tmp_path)
    ppcl_data("encode", tmp_path)
    encoded = tmp_path / "shards" / "encoded"
    shapes = Counter(
        name for entry in index_of(encoded)["shards"] for name, own in entry["shapes"].items() for _ in own
    )
    assert shapes == Counter({"0x8x8": shapes["0x8x8"], "0x4x8": len(CAPTIONS) - shapes["0x8x8"]})
    for name, data in members(encoded).items():
        if name.endswith(".safetensors"):
            tensors = safetensors.torch.load(data)
            assert tensors["latents"].numel() == 0
            assert tensors["size"].tolist() in ([1, 8, 8], [1, 4, 8])
    for folder in ("raw", "encoded"):
        ppcl_data("verify", tmp_path / "shards" / folder)
        ppcl_data("inspect", tmp_path / "shards" / folder)


def test_captions_with_and_without_images_are_one_data_set(tmp_path: Path, ppcl_data: Command) -> None:
    write_tar(tmp_path / "pictures.tar", {f"{n:03d}": {"png": png(n), "txt": b"a picture"} for n in range(20)})
    write_recipe(tmp_path, source=[str(as_text(tmp_path)), str(tmp_path / "pictures.tar")], sizes={"8x8": 1})
    ppcl_data("shard", tmp_path)
    ppcl_data("encode", tmp_path)
    entries = index_of(tmp_path / "shards" / "encoded")["shards"]
    counts = Counter(name for entry in entries for name, own in entry["shapes"].items() for _ in own)
    assert counts == {"0x8x8": len(CAPTIONS), "3x8x8": 20}


def test_captions_alone_need_sizes(tmp_path: Path, ppcl_data: Command) -> None:
    write_recipe(tmp_path, source=str(as_text(tmp_path)))
    assert "captions.txt holds captions alone; say in `data.sizes`" in ppcl_data.fail("shard", tmp_path)
    write_recipe(tmp_path, source=str(as_csv(tmp_path)))
    assert "no column of images" in ppcl_data.fail("shard", tmp_path)
    write_recipe(tmp_path, source=str(as_text(tmp_path)), sizes={"8 x 8": 1})
    assert "'8 x 8' is no size; write height x width" in ppcl_data.fail("shard", tmp_path)
