"""Promises of `ppcl-data shard` and `ppcl-data encode`, made through the commands themselves."""

from __future__ import annotations

import filecmp
import hashlib
import json
import shutil
import sys
import tarfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from data_tools import cli
from ppcl_ds.data.encoders import PixelEncoder, TableTextEncoder
from ppcl_ds.data.stream import MicroBatchStream, empty_prompt, split_shards

COUNT = 30


def write_images(source: Path) -> None:
    """COUNT noise pictures in two folders, as png, jpg and webp in turn; caption `number n`."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        suffix = (".png", ".JPG", ".webp")[number % 3]
        path = source / f"part {number % 2}" / f"{number:03d}.v1{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"number {number}\n")


def write_recipe(folder: Path, **data: Any) -> None:
    section = {
        "source": str(folder / "images"),
        "shards": str(folder / "shards"),
        "samples_per_shard": 8,
        "heldout": 0.25,
        "images": {"channels": 3, "size": 8},
        "captions": {"width": 6},
    }
    recipe = {
        "run": str(folder),
        "data": section | data,
        "teacher": {"path": "teacher"},
        "plan": {"variants": {"small": 0.3}},
        "distill": {"steps": 1, "micro_batch": 1, "micro_batches_per_step": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with images and a recipe."""
    write_images(tmp_path / "images")
    write_recipe(tmp_path)
    return tmp_path


@dataclass
class Command:
    """Runs `ppcl-data` as a shell would: arguments in, exit code and output out."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, name: str, folder: Path) -> str:
        """Run a command that should succeed; its output."""
        code, out, err = self.run(name, folder)
        assert code == 0, err
        return out

    def fail(self, name: str, folder: Path) -> str:
        """Run a command that should fail; its one line on stderr."""
        code, _, err = self.run(name, folder)
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    def run(self, name: str, folder: Path) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["ppcl-data", name, str(folder / "recipe.yaml")])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = self.capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err


@pytest.fixture
def ppcl_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def members(folder: Path, pattern: str = "*.tar") -> dict[str, bytes]:
    """Members of every shard in a folder that fits the pattern, by name."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def index(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "index.json").read_text())["shards"])


def test_every_image_and_caption_is_stored_untouched_in_one_split(project: Path, ppcl_data: Command) -> None:
    out = ppcl_data("shard", project)
    raw = project / "shards" / "raw"
    train, heldout = members(raw, "train-*.tar"), members(raw, "heldout-*.tar")
    assert len(train) > len(heldout) > 0
    assert not train.keys() & heldout.keys()
    stored = train | heldout
    assert len(stored) == 2 * COUNT
    for image in (path for path in (project / "images").rglob("*") if path.suffix in {".png", ".JPG", ".webp"}):
        key = f"{image.parent.name}_{image.stem}".replace(" ", "_").replace(".", "_")
        assert stored[f"{key}{image.suffix.lower()}"] == image.read_bytes()
        assert stored[f"{key}.txt"] == image.with_suffix(".txt").read_bytes()
    assert f"{len(train) // 2} train samples" in out


def test_the_index_tells_the_truth_about_every_shard(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    for folder in (project / "shards" / "raw", project / "shards" / "encoded"):
        entries = index(folder)
        assert sorted(entry["name"] for entry in entries) == sorted(path.name for path in folder.glob("*.tar"))
        for entry in entries:
            assert entry["sha256"] == hashlib.sha256((folder / entry["name"]).read_bytes()).hexdigest()
            assert entry["samples"] == len(members(folder, entry["name"])) / 2
            assert 1 <= entry["samples"] <= 8


def test_repeated_commands_give_identical_bytes(project: Path, tmp_path: Path, ppcl_data: Command) -> None:
    write_recipe(project, shards=str(tmp_path / "first"))
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    write_recipe(project, shards=str(tmp_path / "second"))
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    for folder in ("raw", "encoded"):
        first, second = tmp_path / "first" / folder, tmp_path / "second" / folder
        names = sorted(path.name for path in first.iterdir())
        assert names == sorted(path.name for path in second.iterdir())
        assert filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])


def test_a_sample_keeps_its_split_when_others_come_and_go(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    before = members(project / "shards" / "raw", "heldout-*.tar").keys()
    Image.new("RGB", (8, 8)).save(project / "images" / "new.png")
    (project / "images" / "new.txt").write_text("new")
    write_recipe(project, shards=str(project / "again"))
    ppcl_data("shard", project)
    after = members(project / "again" / "raw", "heldout-*.tar").keys()
    assert after - {"new.png", "new.txt"} == before


def test_without_heldout_everything_but_hidden_files_is_for_training(project: Path, ppcl_data: Command) -> None:
    (project / "images" / "._001.png").write_bytes(b"left by another system")
    (project / "images" / ".cache").mkdir()
    (project / "images" / ".cache" / "a.png").write_bytes(b"a thumbnail")
    write_recipe(project, heldout=0.0)
    ppcl_data("shard", project)
    assert sum(entry["samples"] for entry in index(project / "shards" / "raw")) == COUNT
    assert not list((project / "shards" / "raw").glob("heldout*"))


def test_finished_work_is_not_done_again(project: Path, ppcl_data: Command) -> None:
    for name, folder in (("shard", "raw"), ("encode", "encoded")):
        ppcl_data(name, project)
        times = {path: path.stat().st_mtime_ns for path in (project / "shards" / folder).iterdir()}
        assert "already" in ppcl_data(name, project)
        assert {path: path.stat().st_mtime_ns for path in (project / "shards" / folder).iterdir()} == times


def test_a_changed_recipe_or_a_lost_shard_is_noticed(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    write_recipe(project, captions={"width": 10})
    assert "already" in ppcl_data("shard", project)
    ppcl_data("encode", project)
    shards = split_shards(project / "shards", "train")
    assert next(MicroBatchStream(shards, 1, 0, masked=True).take(0, 1))[1].prompts.embeds.shape[-1] == 10
    shards[0].unlink()
    ppcl_data("encode", project)
    assert shards[0].is_file()
    write_recipe(project, captions={"width": 10}, samples_per_shard=3)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    assert max(entry["samples"] for entry in index(project / "shards" / "encoded")) == 3


def test_encoded_samples_are_what_the_encoders_say(project: Path, ppcl_data: Command) -> None:
    write_recipe(project, captions={"width": 6, "pooled_width": 4})
    (project / "images" / "part 0" / "000.v1.txt").write_text("the first of all numbers")
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    stored = members(project / "shards" / "encoded")
    image = Image.open(project / "images" / "part 0" / "000.v1.png")
    prompt = TableTextEncoder(6, 4).encode(["the first of all numbers"])
    tensors = safetensors.torch.load(stored["part_0_000_v1.safetensors"])
    assert stored["part_0_000_v1.txt"] == b"the first of all numbers"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["latents"], PixelEncoder(3, 8).encode([image])[0].bfloat16())
    assert torch.equal(tensors["prompt_embeds"].float(), prompt.embeds[0])
    assert prompt.pooled is not None
    assert torch.equal(tensors["pooled"].float(), prompt.pooled[0])
    shorter = safetensors.torch.load(stored["part_1_001_v1.safetensors"])
    assert shorter["prompt_embeds"].shape == (2, 6), "a shorter caption of the same batch is stored without padding"


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_the_stream_reads_what_the_commands_wrote(project: Path, ppcl_data: Command, max_tokens: int) -> None:
    captions = {"width": 6, "max_tokens": max_tokens}
    write_recipe(project, captions=captions)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    encoder, masked = TableTextEncoder(**captions), max_tokens == 0
    empty, expected = empty_prompt(project / "shards", masked), encoder.encode([""])
    assert torch.equal(empty.embeds, expected.embeds)
    assert (empty.mask is None) == (expected.mask is None)
    stream = MicroBatchStream(split_shards(project / "shards", "train"), 4, 0, masked=masked)
    for _, batch in islice(stream.take(0, 1), 10):
        assert batch.latents.shape == (4, 3, 8, 8)
        numbers = [int(key.split("_")[2]) for key in batch.keys]
        prompts = encoder.encode([f"number {number}" for number in numbers])
        assert torch.equal(batch.prompts.embeds, prompts.embeds)
        assert (batch.prompts.mask is None) == (max_tokens > 0)


def test_photographs_are_encoded_upright(project: Path, ppcl_data: Command) -> None:
    sideways = Image.new("L", (8, 8))
    sideways.paste(255, (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise to look at me"
    sideways.save(project / "images" / "photo.png", exif=exif)
    (project / "images" / "photo.txt").write_text("photo")
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    latents = safetensors.torch.load(members(project / "shards" / "encoded")["photo.safetensors"])["latents"]
    assert (latents[:, :4] == 1).all()
    assert (latents[:, 4:] == -1).all()


def test_images_that_cannot_be_samples_are_named(project: Path, ppcl_data: Command) -> None:
    twin = project / "images" / "part_0_000_v1.png"
    twin.write_bytes(b"")
    assert f"{twin} has no caption" in ppcl_data.fail("shard", project)
    twin.with_suffix(".txt").write_bytes(b"")
    error = ppcl_data.fail("shard", project)
    both = (twin, project / "images" / "part 0" / "000.v1.png")
    assert all(str(path) in error for path in both), "two files that would have one key are both named"


@pytest.mark.parametrize(("heldout", "side"), [(0.001, "heldout"), (0.999, "train")])
def test_a_split_without_samples_is_refused(project: Path, ppcl_data: Command, heldout: float, side: str) -> None:
    write_recipe(project, heldout=heldout)
    assert f"leaves no {side} samples" in ppcl_data.fail("shard", project)


def test_what_is_not_there_yet_is_named(project: Path, ppcl_data: Command) -> None:
    assert f"{project / 'nowhere' / 'recipe.yaml'}: No such file" in ppcl_data.fail("shard", project / "nowhere")
    assert "run `ppcl-data shard RECIPE` first" in ppcl_data.fail("encode", project)
    write_recipe(project, source=str(project / "nowhere"))
    assert "nowhere: no such folder" in ppcl_data.fail("shard", project)
    (project / "nowhere").mkdir()
    assert "nowhere: no images" in ppcl_data.fail("shard", project)


def test_a_folder_that_others_filled_is_not_overwritten(project: Path, ppcl_data: Command) -> None:
    foreign = project / "shards" / "raw" / "theirs.tar"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"precious")
    assert "was not written here" in ppcl_data.fail("shard", project)
    assert foreign.read_bytes() == b"precious"


def test_an_interrupted_shard_leaves_nothing_that_looks_whole(project: Path, ppcl_data: Command) -> None:
    caption = project / "images" / "part 1" / "003.v1.txt"
    caption.write_bytes(b"\xff\xfe")
    assert "003.v1.txt is not UTF-8" in ppcl_data.fail("shard", project)
    assert not (project / "shards" / "raw").exists()
    caption.write_text("number 3\n")
    ppcl_data("shard", project)
    assert len(members(project / "shards" / "raw")) == 2 * COUNT
    assert [path.name for path in (project / "shards").iterdir()] == ["raw"]


def test_an_interrupted_encode_goes_on_at_the_shard_where_it_stopped(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    raw, encoded = project / "shards" / "raw", project / "shards" / "encoded"
    key = next(name[:-4] for name in members(raw, "train-000001.tar") if name.endswith(".png"))
    image = next(path for path in (project / "images").rglob("*.png") if path.stem[:3] == key.split("_")[2])
    original = image.read_bytes()
    image.write_bytes(original[:60])
    shutil.rmtree(raw)
    ppcl_data("shard", project)
    assert f"train-000001.tar:{key}: the png image cannot be decoded" in ppcl_data.fail("encode", project)
    assert not (encoded / "train-000001.tar").exists()
    assert not (encoded / "index.json").exists()
    first_written = (encoded / "train-000000.tar").stat().st_mtime_ns
    image.write_bytes(original)
    shutil.rmtree(raw)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    assert (encoded / "train-000000.tar").stat().st_mtime_ns == first_written
    assert len(members(encoded)) == 2 * COUNT
    assert not list(encoded.glob("*partial*"))


def test_a_damaged_raw_shard_is_named_and_made_again(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    shard = project / "shards" / "raw" / "train-000000.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        third_sample = tar.getmembers()[4].offset
    shard.write_bytes(whole[:third_sample])
    assert f"{shard} is missing or cut short; run `ppcl-data shard RECIPE`" in ppcl_data.fail("encode", project)
    shard.write_bytes(whole[:third_sample] + bytes(512) + whole[third_sample + 512 :])
    assert f"{shard} holds 2 samples, its index says 8" in ppcl_data.fail("encode", project)
    shard.unlink()
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
    stream = MicroBatchStream(split_shards(folder, "train"), 1, 0, masked=True)
    keys = {batch.keys[0] for _, batch in islice(stream.take(0, 1), COUNT + 1)}
    assert f"__{name}__".replace(" ", "_") in keys
