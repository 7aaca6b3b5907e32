"""Pictures to edit: NAME.source.png beside NAME.png goes all the way to what an editing pipeline reads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

from ppcl_ds.data.images import as_rgb
from ppcl_ds.data.stored import EMPTY, Stored
from ppcl_ds.data.text import leaves
from tests.data_tools.conftest import Command, index_of, members, png, write_recipe, write_tar
from tests.families.pipelines import PIPELINES, make_pipeline


def write_pair(folder: Path, name: str, number: int, source: int | None = None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.png").write_bytes(png(number))
    (folder / f"{name}.txt").write_text(f"number {number}")
    if source is not None:
        (folder / f"{name}.source.png").write_bytes(png(source))


def skipped_of(project: Path) -> list[str]:
    return list(index_of(project / "shards" / "raw")["skipped"])


def test_a_source_lies_beside_its_image_in_the_shards(tmp_path: Path, ppcl_data: Command) -> None:
    images = tmp_path / "images"
    for number in range(4):
        write_pair(images, str(number), number, 100 + number)
    write_pair(images, "alone", 4)
    write_pair(images, "jpg", 5)
    Image.new("RGB", (8, 8)).save(images / "jpg.source.JPG")
    write_recipe(tmp_path, heldout=0.0)
    ppcl_data("shard", tmp_path)
    raw = members(tmp_path / "shards" / "raw")
    expected = {f"{number}{end}" for number in range(4) for end in (".png", ".txt", ".source.png")}
    assert raw.keys() == expected | {"alone.png", "alone.txt", "jpg.png", "jpg.txt", "jpg.source.jpg"}
    for number in range(4):
        assert raw[f"{number}.png"] == png(number)
        assert raw[f"{number}.source.png"] == png(100 + number)
    assert not skipped_of(tmp_path)
    ppcl_data("verify", tmp_path / "shards")
    assert json.loads(ppcl_data("inspect", tmp_path / "shards", "--json", "-"))["images"] == {"8x8": 6}

    # Shards are a source in their turn, and give the same.
    (tmp_path / "again").mkdir()
    write_recipe(tmp_path / "again", heldout=0.0, source=str(tmp_path / "shards" / "raw"))
    ppcl_data("shard", tmp_path / "again")
    again = members(tmp_path / "again" / "shards" / "raw")
    assert {name.removeprefix("train-000000_"): data for name, data in again.items()} == raw


def test_a_source_that_changes_is_noticed(tmp_path: Path, ppcl_data: Command) -> None:
    for number in range(3):
        write_pair(tmp_path / "images", str(number), number, 100 + number)
    write_recipe(tmp_path, heldout=0.0)
    ppcl_data("shard", tmp_path)
    (tmp_path / "images" / "1.source.png").write_bytes(png(200))
    assert "1 changed" in ppcl_data("shard", tmp_path)
    ppcl_data("shard", tmp_path, "--update")
    assert members(tmp_path / "shards" / "raw")["1.source.png"] == png(200)


def test_sources_are_made_smaller_as_images_are(tmp_path: Path, ppcl_data: Command) -> None:
    write_pair(tmp_path / "images", "a", 1)
    (tmp_path / "images" / "a.source.png").write_bytes(png(2, (64, 16)))
    write_recipe(tmp_path, heldout=0.0, longest_side=32)
    ppcl_data("shard", tmp_path)
    raw = members(tmp_path / "shards" / "raw")
    assert Image.open(io.BytesIO(raw["a.source.png"])).size == (32, 8)
    assert raw["a.png"] == png(1)


def test_sources_that_cannot_be_used_are_named(tmp_path: Path, ppcl_data: Command) -> None:
    images = tmp_path / "images"
    for name in ("good", "two", "broken"):
        write_pair(images, name, 1, 2)
    Image.new("RGB", (8, 8)).save(images / "two.source.jpg")
    (images / "broken.source.png").write_bytes(b"no picture")
    write_recipe(tmp_path, heldout=0.0, max_bad_fraction=0.9)
    ppcl_data("shard", tmp_path)
    skipped = "\n".join(skipped_of(tmp_path))
    assert "it has two source images, two.source.jpg and two.source.png" in skipped
    assert "broken.png: the source.png image" in skipped
    assert {name.partition(".")[0] for name in members(tmp_path / "shards" / "raw")} == {"good"}


def test_what_is_only_called_so_stays_what_it_was(tmp_path: Path, ppcl_data: Command) -> None:
    """A picture with a caption of its own is a sample; one that `data.image_suffixes` asks for is the image."""
    images = tmp_path / "images"
    write_pair(images, "a", 1)
    write_pair(images, "a.source", 2)
    write_pair(images, "b.source", 3)
    write_recipe(tmp_path, heldout=0.0)
    ppcl_data("shard", tmp_path)
    raw = members(tmp_path / "shards" / "raw")
    assert raw.keys() == {f"{key}.{kind}" for key in ("a", "a_source", "b_source") for kind in ("png", "txt")}

    both = {"source.png": png(1), "target.png": png(2), "txt": b"a"}
    write_tar(tmp_path / "theirs.tar", {"k": both, "only": {"source.png": png(3), "txt": b"b"}})
    for suffix, image, kept in (("target.png", 2, True), ("source.png", 1, False)):
        project = tmp_path / suffix
        project.mkdir()
        write_recipe(
            project, heldout=0.0, source=str(tmp_path / "theirs.tar"), image_suffixes=[suffix], max_bad_fraction=0.9
        )
        ppcl_data("shard", project)
        raw = members(project / "shards" / "raw")
        assert raw["theirs_k.png"] == png(image)
        assert raw.get("theirs_k.source.png") == (png(1) if kept else None)


def test_an_editing_pipeline_encodes_sources(tmp_path: Path, ppcl_data: Command) -> None:
    make_pipeline("flux_kontext", tmp_path / "kontext")
    call = PIPELINES["flux_kontext"].call
    options = {key: call[key] for key in ("max_sequence_length", "guidance_scale", "max_area", "_auto_resize")}
    random = np.random.default_rng(0)
    for number in range(3):
        write_pair(tmp_path / "images", str(number), number)
        if number:  # 0 is its own source
            noise = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / f"{number}.source.png")
    teacher = {"path": str(tmp_path / "kontext"), "options": options | {"image": "source"}}
    write_recipe(tmp_path, teacher, heldout=0.0, images={"size": 16, "step": 16})
    ppcl_data("shard", tmp_path)
    ppcl_data("encode", tmp_path, "--keep-images")
    ppcl_data("verify", tmp_path / "shards")
    encoded = members(tmp_path / "shards" / "encoded")
    assert encoded["1.source.png"] == (tmp_path / "images" / "1.source.png").read_bytes()
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "kontext" / "vae", local_files_only=True)
    for number in range(3):
        stored = Stored.read(encoded[f"{number}.safetensors"])
        name = f"{number}.source.png" if number else "0.png"
        picture = as_rgb(Image.open(tmp_path / "images" / name)).resize((16, 16), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            expected = vae.encode(pixels).latent_dist.mode()
        assert stored.prompts.keys() == {"", EMPTY}
        for prompt in stored.prompts.values():
            assert prompt.source == (16, 16)
            [found] = [leaf for _, leaf in leaves(prompt.images) if isinstance(leaf, torch.Tensor)]
            torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=0, atol=2e-2)
