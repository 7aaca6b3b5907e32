"""Clips go from their folder, table or shard to latents of as many frames as the stock VAE reads."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ppcl_ds.data.batch import Size
from ppcl_ds.data.stored import Stored
from tests.clips import LOSSLESS, noise, write_clip
from tests.data_tools.conftest import Command, index_of, members, png, write_recipe, write_tar
from tests.families.pipelines import PIPELINES, make_pipeline

LENGTHS = {"wan": {4: 1, 5: 5, 7: 5, 9: 9, 11: 9}, "ltx": {8: 5, 9: 9, 11: 9}}
"""Frames of a clip -> frames that are encoded; the tiny VAEs take four, or four, to a latent."""
FRAMES = 9


def clip(project: Path, name: str, frames: list[Image.Image]) -> None:
    write_clip(project / "images" / f"{name}.mkv", frames, **LOSSLESS)
    (project / "images" / f"{name}.txt").write_text(f"clip {name}")


def recipe(project: Path, family: str, **data: Any) -> None:
    make_pipeline(family, project / family)
    call = PIPELINES[family].call
    options = {key: call[key] for key in ("max_sequence_length", "guidance_scale") if key in call}
    side = int(call["height"])
    images = {"size": side, "step": side, "frames": FRAMES}
    write_recipe(
        project, {"path": str(project / family), "options": options}, **{"heldout": 0.0, "images": images} | data
    )


@pytest.mark.parametrize("family", LENGTHS)
def test_latents_are_what_the_stock_vae_makes_of_the_frames(family: str, tmp_path: Path, ppcl_data: Command) -> None:
    recipe(tmp_path, family)
    side = int(PIPELINES[family].call["height"])
    given = {length: noise(length, side, side, seed=length) for length in LENGTHS[family]}
    for length, frames in given.items():
        clip(tmp_path, str(length), frames)
    still = noise(1, side, side, seed=99)
    still[0].save(tmp_path / "images" / "still.png")
    (tmp_path / "images" / "still.txt").write_text("a still")
    ppcl_data("shard", tmp_path)
    ppcl_data("encode", tmp_path)
    ppcl_data("verify", tmp_path / "shards")
    encoded = members(tmp_path / "shards" / "encoded")
    vae = diffusers.DiffusionPipeline.from_pretrained(tmp_path / family, local_files_only=True).vae
    shapes: dict[str, int] = {}
    for name, frames, length in [
        *((str(length), frames, LENGTHS[family][length]) for length, frames in given.items()),
        ("still", still, 1),
    ]:
        stored = Stored.read(encoded[f"{name}.safetensors"])
        pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames[:length]]))
        with torch.no_grad():
            expected = vae.encode(pixels.permute(3, 0, 1, 2)[None] / 127.5 - 1).latent_dist.mode()[0]
        assert stored.size == Size(side, side, length)
        torch.testing.assert_close(stored.latents, expected.bfloat16().float(), rtol=0, atol=2e-2)
        shape = "x".join(map(str, expected.shape))
        shapes[shape] = shapes.get(shape, 0) + 1
    found: dict[str, int] = {}
    for entry in index_of(tmp_path / "shards" / "encoded")["shards"]:
        for shape, numbers in entry["shapes"].items():
            found[shape] = found.get(shape, 0) + len(numbers)
    assert found == shapes, "a bucket for each number of frames"


def test_clips_of_tables_and_shards_and_what_inspect_says_of_them(tmp_path: Path, ppcl_data: Command) -> None:
    for number in range(3):
        write_clip(tmp_path / "clips" / f"{number}.MP4", noise(5 + number, 32, 16))
    rows = [{"video": f"{number}.MP4", "caption": "a clip"} for number in range(2)]
    (tmp_path / "clips" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = (tmp_path / "clips" / "2.MP4").read_bytes()
    write_tar(tmp_path / "a.tar", {"two": {"mp4": data, "txt": b"two"}, "still": {"png": png(), "txt": b"still"}})
    write_recipe(
        tmp_path, heldout=0.0, source=[str(tmp_path / "clips" / "t.jsonl"), str(tmp_path / "a.tar")], longest_side=8
    )
    ppcl_data("shard", tmp_path)
    raw = members(tmp_path / "shards" / "raw")
    assert raw["a_two.mp4"] == data, "clips stay as they are"
    assert sum(name.endswith(".mp4") for name in raw) == 3
    sheet = tmp_path / "sheet.html"
    figures = json.loads(ppcl_data("inspect", tmp_path / "shards", "--sheet", str(sheet), "--json", "-"))
    assert figures["frames"] == {"1": 1, "5": 1, "6": 1, "7": 1}
    assert figures["images"] == {"32x16": 3, "8x8": 1}
    assert not figures["problems"]
    assert "cannot be decoded" not in sheet.read_text()


def test_a_broken_clip_costs_its_own_sample(tmp_path: Path, ppcl_data: Command) -> None:
    recipe(tmp_path, "wan", max_bad_fraction=0.9)
    for number in range(3):
        clip(tmp_path, str(number), noise(5))
    path = tmp_path / "images" / "1.mkv"
    path.write_bytes(path.read_bytes()[:-3000])
    ppcl_data("shard", tmp_path)
    [line] = index_of(tmp_path / "shards" / "raw")["skipped"]
    assert "1.mkv: the mkv clip is cut short: it ends after 0.25 of 0.62 seconds" in line
    ppcl_data("encode", tmp_path)
    assert {name.partition(".")[0] for name in members(tmp_path / "shards" / "encoded")} == {"0", "2"}
    # `verify` decodes what others have written.
    data = path.read_bytes()
    write_tar(tmp_path / "theirs" / "a.tar", {"cut": {"mkv": data, "txt": b"cut"}})
    code, out, _ = ppcl_data.run("verify", tmp_path / "theirs")
    assert code == 1
    assert "a.tar:cut: the mkv clip is cut short" in out


def test_clips_that_the_recipe_does_not_expect_end_the_command(tmp_path: Path, ppcl_data: Command) -> None:
    clip(tmp_path, "a", noise(5))
    recipe(tmp_path, "flux")
    ppcl_data("shard", tmp_path)
    said = ppcl_data.fail("encode", tmp_path)
    assert "train-000000.tar:a is a clip (.mkv), but FluxPipeline draws images" in said
    recipe(tmp_path, "wan", images={"size": 16, "step": 16})
    assert "a is a clip (.mkv); set data.images.frames" in ppcl_data.fail("encode", tmp_path)


def test_a_clip_beside_a_photograph_is_left_where_no_clips_are_wanted(tmp_path: Path, ppcl_data: Command) -> None:
    """As telephones leave them; where clips are wanted, the two are told apart by `data.image_suffixes`."""
    clip(tmp_path, "a", noise(5))
    noise(1)[0].save(tmp_path / "images" / "a.png")
    recipe(tmp_path, "wan", images={"size": 16, "step": 16})
    ppcl_data("shard", tmp_path)
    assert {name for name in members(tmp_path / "shards" / "raw")} == {"a.png", "a.txt"}
    recipe(tmp_path, "wan", max_bad_fraction=0.9)
    assert "a.mkv" in ppcl_data.fail("shard", tmp_path)


def frames(folder: Path, pictures: list[Image.Image], name: str = "{:04d}.png") -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / name.format(number))


def test_a_folder_of_frames_is_what_the_clip_of_them_is(tmp_path: Path, ppcl_data: Command) -> None:
    recipe(tmp_path, "wan")
    pictures = noise(11)  # of which the order of names is not that of numbers
    clip(tmp_path, "whole", pictures[:9])
    frames(tmp_path / "images" / "v1.2", pictures, "f-{}.PNG")
    (tmp_path / "images" / "v1.2.json").write_text(json.dumps({"caption": "clip whole"}))
    frames(tmp_path / "images" / "photographs", pictures[:2])
    for number in range(2):
        (tmp_path / "images" / "photographs" / f"{number:04d}.txt").write_text("an image of its own")
    (tmp_path / "images" / "photographs.txt").write_text("about this folder")
    ppcl_data("shard", tmp_path)
    ppcl_data("encode", tmp_path)
    ppcl_data("verify", tmp_path / "shards")
    raw = members(tmp_path / "shards" / "raw")
    assert {name for name in raw if name.endswith((".frames", ".png"))} == {
        "v1_2.frames",
        "photographs_0000.png",
        "photographs_0001.png",
    }
    with tarfile.open(fileobj=io.BytesIO(raw["v1_2.frames"])) as tar:
        packed = [tar.extractfile(entry) for entry in tar]
        stored = [file.read() for file in packed if file]
    assert stored == [(tmp_path / "images" / "v1.2" / f"f-{n}.PNG").read_bytes() for n in range(11)]
    encoded = members(tmp_path / "shards" / "encoded")
    own, other = (Stored.read(encoded[f"{name}.safetensors"]) for name in ("v1_2", "whole"))
    assert own.size == other.size == Size(16, 16, 9)
    assert torch.equal(own.latents, other.latents)
    figures = json.loads(ppcl_data("inspect", tmp_path / "shards" / "raw", "--json", "-"))
    assert figures["frames"] == {"1": 2, "9": 1, "11": 1}


def test_a_table_names_folders_of_frames(tmp_path: Path, ppcl_data: Command) -> None:
    frames(tmp_path / "images" / "clips" / "a", noise(5))
    (tmp_path / "images" / "metadata.jsonl").write_text(json.dumps({"file_name": "clips/a", "caption": "a clip"}))
    recipe(tmp_path, "wan")
    ppcl_data("shard", tmp_path)
    assert not index_of(tmp_path / "shards" / "raw")["skipped"]
    assert set(members(tmp_path / "shards" / "raw")) == {"clips_a.frames", "clips_a.txt"}


def test_a_folder_of_frames_that_is_none_costs_its_own_sample(tmp_path: Path, ppcl_data: Command) -> None:
    recipe(tmp_path, "wan", max_bad_fraction=0.9)
    for name in ("good", "mixed", "twice", "sizes", "cut"):
        frames(tmp_path / "images" / name, noise(3))
        (tmp_path / "images" / f"{name}.txt").write_text(name)
    (tmp_path / "images" / "mixed" / "notes.md").write_text("")
    noise(1)[0].save(tmp_path / "images" / "twice" / "02.png")
    noise(1, 8, 8)[0].save(tmp_path / "images" / "sizes" / "0002.png")
    cut = tmp_path / "images" / "cut" / "0001.png"
    cut.write_bytes(cut.read_bytes()[:200])
    ppcl_data("shard", tmp_path)
    said = "\n".join(index_of(tmp_path / "shards" / "raw")["skipped"])
    assert "mixed: it is a folder of frames, but notes.md in it is no numbered image" in said
    assert "twice: its frames 0002.png and 02.png have one number" in said
    assert "sizes: the frames clip has a frame 000002.png that has 8 x 8 pixels, not 16 x 16" in said
    ppcl_data("encode", tmp_path)
    [line] = index_of(tmp_path / "shards" / "encoded")["skipped"]
    assert "cut: the frames clip has a frame 000001.png that cannot be decoded" in line
    assert {name.partition(".")[0] for name in members(tmp_path / "shards" / "encoded")} == {"good"}
