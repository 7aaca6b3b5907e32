"""Promises of `ppcl-data verify`: what is wrong is found and named, what is not wrong is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from data_tools.samples import read_parts
from ppcl_ds.data.index import Index, describe, scan
from ppcl_ds.data.stored import Stored
from tests.data_tools.conftest import COUNT, Command, index_of, png, tree, write_tar


@pytest.fixture
def shards(project: Path, ppcl_data: Command) -> Path:
    """Sound raw and encoded shards."""
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    return project / "shards"


def rewrite(path: Path, change: Callable[[dict[str, dict[str, bytes]]], Any], own_index: bool = True) -> None:
    """Write a shard anew with samples changed, and, unless told otherwise, an index that agrees with it."""
    with path.open("rb") as file:
        samples = {member.key: read_parts(file, member) for member in scan(file)[0]}
    change(samples)
    write_tar(path, samples)
    if own_index:
        index = Index.read(path.parent / "index.json", "")
        with path.open("rb") as file:
            found, _ = scan(file)
        for number, entry in enumerate(index.shards):
            if entry.name == path.name:
                index.shards[number] = describe(path, found, shapes=entry.shapes, raw_sha256=entry.raw_sha256)
        index.write(path.parent / "index.json")


def problems(ppcl_data: Command, folder: Path, *more: str | Path) -> list[str]:
    """What `verify` lists, which it also prints; the exit code says whether there is any."""
    root = next((parent for parent in folder.parents if (parent / "recipe.yaml").exists()), folder.parent)
    file = root / "verify.json"
    code, out, err = ppcl_data.run("verify", folder, "--json", file, *more)
    found = list(json.loads(file.read_text())["problems"])
    assert code == (1 if found else 0), err
    assert all(line in out for line in found)
    return found


def second(samples: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    return list(samples.values())[1]


def set_tensor(
    name: str, value: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, dict[str, bytes]]], Any]:
    def change(samples: dict[str, dict[str, bytes]]) -> None:
        data = second(samples)["safetensors"]
        tensors = safetensors.torch.load(data)
        tensors[name] = value(tensors[name])
        words = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        second(samples)["safetensors"] = safetensors.torch.save(tensors, words)

    return change


def with_another_text(samples: dict[str, dict[str, bytes]]) -> None:
    """Of a caption that the sample does not have."""
    stored = Stored.read(second(samples)["safetensors"])
    prompts = {**stored.prompts, "caption_de": stored.prompts[""]}
    second(samples)["safetensors"] = replace(stored, prompts=prompts).write()


def of_an_earlier_release(samples: dict[str, dict[str, bytes]]) -> None:
    tensors = {"latents": torch.zeros(3, 8, 8), "prompt_embeds": torch.zeros(2, 6)}
    second(samples)["safetensors"] = safetensors.torch.save(tensors)


def nan_at(place: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[place] = float("nan")
        return tensor

    return change


def image_of(parts: dict[str, bytes]) -> str:
    return next(suffix for suffix in parts if suffix != "txt")


def test_sound_shards_have_no_problems(shards: Path, ppcl_data: Command) -> None:
    before = tree(shards)
    for folder in (shards, shards / "raw", shards / "encoded"):
        assert problems(ppcl_data, folder) == []
    assert problems(ppcl_data, shards, "--workers", "3") == []
    assert tree(shards) == before


@pytest.mark.parametrize(
    ("folder", "change", "why"),
    [
        ("raw", lambda s: second(s).update({image_of(second(s)): second(s)[image_of(second(s))][:90]}), "image"),
        ("raw", lambda s: second(s).update(txt=b"\xff"), "its caption (.txt) is not UTF-8"),
        ("raw", lambda s: second(s).update(txt=b" "), "its caption is empty"),
        ("raw", lambda s: second(s).pop("txt"), "no caption (.txt or .json)"),
        ("raw", lambda s: second(s).pop(image_of(second(s))), "no image"),
        ("raw", lambda s: second(s).update(json=b"{"), "its .json is damaged"),
        ("encoded", lambda s: second(s).pop("txt"), "no caption (.txt)"),
        ("raw", lambda s: second(s).update({"source.png": png()[:40]}), "the source.png image"),
        ("encoded", lambda s: second(s).update(safetensors=b"\x08" + bytes(20)), "damaged"),
        ("encoded", set_tensor("latents", nan_at(3)), "NaN or infinity in its latents"),
        ("encoded", set_tensor("text.0", lambda t: t / 0), "NaN or infinity in its text"),
        ("encoded", set_tensor("latents", lambda t: t[0]), "latents of shape (8, 8)"),
        ("encoded", with_another_text, "text.caption_de is of a caption that it does not have"),
        ("encoded", of_an_earlier_release, "encoded by an earlier release; run `ppcl-data encode RECIPE` again"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named_and_left_out_of_copies(
    shards: Path, ppcl_data: Command, folder: str, change: Callable[..., Any], why: str
) -> None:
    path = shards / folder / "train-000001.tar"
    with path.open("rb") as file:
        key = scan(file)[0][1].key
    rewrite(path, change)
    before = tree(shards)
    named = [line for line in problems(ppcl_data, shards, "--repair", shards.parent / "clean") if key in line]
    assert len(named) == 1
    assert named[0].startswith(f"train-000001.tar:{key}: ")
    assert why in named[0]
    assert tree(shards) == before, "the originals stay as they are"
    clean = shards.parent / "clean"
    assert problems(ppcl_data, clean) == []
    assert sum(entry["samples"] for entry in index_of(clean / folder)["shards"]) == COUNT - 1
    assert named[0] in index_of(clean / folder)["skipped"]
    untouched = {name: data for name, data in before.items() if name.endswith(".tar") and "train-000001" not in name}
    assert untouched.items() <= tree(clean).items()
    assert index_of(clean / folder)["settings"] == index_of(shards / folder)["settings"]
    for entry in index_of(clean / "encoded")["shards"]:
        assert entry["raw_sha256"], "what a shard was made from is carried over"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[600] ^= 4
    path.write_bytes(data)


def climb(path: Path) -> None:
    rewrite(path, lambda samples: samples.update({"../../x": {"png": png(), "txt": b"x"}}), own_index=False)


def close(path: Path) -> None:
    path.write_bytes(path.read_bytes().rstrip(b"\0"))


@pytest.mark.parametrize("folder", ["raw", "encoded"])
@pytest.mark.parametrize(
    ("damage", "whys"),
    [
        (truncate, ["bytes long", "checksum", "cut short", "samples, its index says"]),
        (flip, ["checksum"]),
        (climb, ["../../x.png: not a name that a sample has", "checksum"]),
        (close, ["cut short", "checksum"]),
        (Path.unlink, ["train-000001.tar: missing"]),
    ],
)
def test_a_shard_that_is_not_what_it_was_is_named(
    shards: Path, ppcl_data: Command, folder: str, damage: Callable[[Path], Any], whys: list[str]
) -> None:
    damage(shards / folder / "train-000001.tar")
    before = tree(shards)
    clean = shards.parent / "clean"
    found = problems(ppcl_data, shards / folder, "--repair", clean)
    for why in whys:
        assert any(line.startswith("train-000001.tar") and why in line for line in found), (why, found)
    assert all(line.startswith("train-000001.tar") for line in found)
    assert tree(shards) == before
    assert problems(ppcl_data, clean) == []


def test_the_index_is_compared_in_all_it_says(shards: Path, ppcl_data: Command) -> None:
    path = shards / "encoded" / "index.json"
    sound = path.read_bytes()
    for change, why in (
        (lambda entry: entry["offsets"].__setitem__(2, 7), "do not lie where the index says"),
        (lambda entry: entry["shapes"].update({"3x8x8": [0]}), "do not have the shapes"),
        (lambda entry: entry.update(samples=3), "samples, its index says 3"),
        (lambda entry: entry.update(size=3), "bytes long, its index says 3"),
        (lambda entry: entry.update(sha256="0"), "checksum"),
    ):
        index = json.loads(sound)
        change(index["shards"][0])
        path.write_text(json.dumps(index))
        (line,) = problems(ppcl_data, shards)
        assert line.startswith(f"{index['shards'][0]['name']}: ")
        assert why in line
    path.write_text("{")
    assert problems(ppcl_data, shards) == ["index.json: damaged; `ppcl-data index` writes a new one"]
    path.write_bytes(sound)
    (shards / "encoded" / "train-more.tar").write_bytes((shards / "encoded" / "train-000000.tar").read_bytes())
    assert problems(ppcl_data, shards) == ["train-more.tar: not in the index"]
    (shards / "encoded" / "train-more.tar").unlink()
    (shards / "encoded" / "texts.safetensors").write_bytes(b"")
    (line,) = problems(ppcl_data, shards)
    assert line.startswith("texts.safetensors: damaged")


def test_shards_without_an_index_are_looked_at_too(tmp_path: Path, ppcl_data: Command) -> None:
    write_tar(tmp_path / "s" / "a.tar", {"a": {"png": png(), "txt": b"a"}, "b": {"png": b"no", "txt": b"b"}})
    (line,) = problems(ppcl_data, tmp_path / "s", "--repair", tmp_path / "clean")
    assert line.startswith("a.tar:b: the png image ")
    assert index_of(tmp_path / "clean")["shards"][0]["samples"] == 1


def test_copies_go_to_an_empty_folder_only(shards: Path, ppcl_data: Command) -> None:
    clean = shards.parent / "clean"
    clean.mkdir()
    (clean / "mine").write_text("precious")
    assert "not an empty folder" in ppcl_data.fail("verify", shards, "--repair", clean)
    (clean / "mine").unlink()
    assert problems(ppcl_data, shards, "--repair", clean) == []
    assert {n: v for n, v in tree(clean).items() if n.endswith((".tar", ".json", ".safetensors"))} == {
        n: v for n, v in tree(shards, {".journal.jsonl", ".source.json"}).items() if "entries" not in n
    }
    (shards.parent / "void").mkdir()
    assert "no shards" in ppcl_data.fail("verify", shards.parent / "void")
