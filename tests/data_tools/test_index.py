"""Promises of `ppcl-data index` on shards that someone else wrote."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import islice
from pathlib import Path

import torch

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.stored import Stored
from ppcl_ds.data.stream import MicroBatchStream
from ppcl_ds.recipe import load_recipe
from tests.data_tools.conftest import Command, index_of, png, tree, write_recipe, write_tar


def encoded(number: int, width: int = 8) -> dict[str, bytes]:
    prompt = Prompt(((torch.ones(1, 2, 6), None),))
    stored = Stored(torch.full((3, 8, width), float(number)), Size(8, width), {"": prompt})
    return {"safetensors": stored.write(), "txt": f"number {number}".encode()}


def test_foreign_shards_can_be_trained_on(tmp_path: Path, ppcl_data: Command) -> None:
    folder = tmp_path / "shards" / "encoded"
    for shard in range(3):
        samples = {f"k{shard}{own}": encoded(10 * shard + own, 8 if own % 2 else 16) for own in range(6)}
        write_tar(folder / f"train-{shard:06d}.tar", samples)
    before = tree(folder)
    out = ppcl_data("index", folder)
    assert "18 samples (shards: 3)" in out
    assert "training reads only" not in out
    after = tree(folder)
    index = json.loads(after.pop("index.json"))
    assert after == before, "nothing else is written, nothing is changed"
    for entry in index["shards"]:
        assert entry["samples"] == 6
        assert entry["sha256"] == hashlib.sha256(before[entry["name"]]).hexdigest()
        assert entry["size"] == len(before[entry["name"]])
        assert entry["shapes"] == {"3x8x16": [0, 2, 4], "3x8x8": [1, 3, 5]}
        for number, offset in enumerate(entry["offsets"]):
            name = f"k{entry['name'][11]}{number}.safetensors"
            assert before[entry["name"]][offset:].startswith(name.encode())
    stream = MicroBatchStream(load_recipe(write_recipe(tmp_path)).data, "train", 2, 0, tmp_path / "log")
    for _, batch in islice(stream.take(0, 1), 12):
        assert [f"number {int(latents[0, 0, 0])}" for latents in batch.latents] == list(batch.captions)


def test_what_is_damaged_is_said_and_recorded(tmp_path: Path, ppcl_data: Command) -> None:
    samples = {"good": {"png": png(), "txt": b"a"}, "lone": {"png": png()}, "last": {"png": png(), "txt": b"b"}}
    write_tar(tmp_path / "odd" / "a.tar", samples)
    write_tar(
        tmp_path / "odd" / "b.tar", {"e0": encoded(0), "e1": {"safetensors": b"12345", "txt": b"x"}, "e2": encoded(2)}
    )
    whole = (tmp_path / "odd" / "a.tar").read_bytes()
    (tmp_path / "odd" / "a.tar").write_bytes(whole[: 5 * 1024])  # all five members, but no end
    out = ppcl_data("index", tmp_path / "odd", "--json", tmp_path / "summary.json")
    assert "training reads only shards named train-... and heldout-...; 2 are not: a.tar" in out
    index = index_of(tmp_path / "odd")
    assert [entry["samples"] for entry in index["shards"]] == [2, 2]
    skipped = "\n".join(index["skipped"])
    for line in ("a.tar:lone: no caption", "cut short", "b.tar:e1: its .safetensors has no header"):
        assert line in skipped
        assert line in out
    assert index["shards"][1]["shapes"] == {"3x8x8": [0, 1]}
    assert json.loads((tmp_path / "summary.json").read_text())["skipped"] == index["skipped"]


def test_patterns_and_addresses_have_their_index_elsewhere(tmp_path: Path, ppcl_data: Command) -> None:
    for shard in range(3):
        write_tar(tmp_path / "far" / f"train-{shard}.tar", {f"k{shard}": {"png": png(), "txt": b"x"}})
    pattern = f"pipe:cat {tmp_path}/far/train-{{0..2}}.tar"
    assert "--out FILE" in ppcl_data.fail("index", Path(pattern))
    ppcl_data("index", Path(pattern), "--out", tmp_path / "near" / "index.json")
    far = index_of(tmp_path / "near")
    assert [entry["name"] for entry in far["shards"]] == ["train-0.tar", "train-1.tar", "train-2.tar"]
    assert [path.name for path in (tmp_path / "near").iterdir()] == ["index.json"], "what was fetched does not stay"
    ppcl_data("index", tmp_path / "far" / "train-{0..2}.tar", "--workers", "3")
    assert index_of(tmp_path / "far") == far
    write_tar(tmp_path / "else" / "train-0.tar", {"x": {"png": png(), "txt": b"x"}})
    assert "--out FILE" in ppcl_data.fail("index", tmp_path / "far" / "train-0.tar", tmp_path / "else" / "train-0.tar")
    two = ppcl_data.fail(
        "index", tmp_path / "far" / "train-0.tar", tmp_path / "else" / "train-0.tar", "--out", tmp_path / "i.json"
    )
    assert "have one name" in two
    (tmp_path / "void").mkdir()
    assert "no shards" in ppcl_data.fail("index", tmp_path / "void")


def test_an_index_that_was_lost_is_made_again(project: Path, ppcl_data: Command) -> None:
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    expected = tree(project / "shards")
    for name in ("raw", "encoded"):
        ppcl_data("index", project / "shards" / name)
    assert tree(project / "shards") == expected, "an index that is right stays as it is, settings and all"
    (project / "shards" / "raw" / "index.json").unlink()
    ppcl_data("index", project / "shards" / "raw")
    made = index_of(project / "shards" / "raw")["shards"]
    assert sorted(made, key=lambda entry: entry["name"]) == sorted(
        json.loads(expected["raw/index.json"])["shards"], key=lambda entry: entry["name"]
    )
    shutil.rmtree(project / "shards" / "encoded")
    ppcl_data("encode", project)
    assert {n: v for n, v in tree(project / "shards").items() if n.endswith(".tar")} == {
        n: v for n, v in expected.items() if n.endswith(".tar")
    }
