"""Promises about a source that changes: it is noticed, and `--update` takes what is new and leaves the rest alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data_tools.conftest import Command, index_of, members, png, write_recipe, write_tar

MORE: dict[str, Any] = {"heldout": 0.3, "samples_per_shard": 4, "max_bad_fraction": 0.9}


def put(source: Path, number: int, caption: str, colour: int | None = None) -> None:
    source.mkdir(exist_ok=True)
    (source / f"{number}.png").write_bytes(png(number if colour is None else colour))
    (source / f"{number}.txt").write_text(caption)


def contents(project: Path, split: str = "*") -> dict[str, bytes]:
    return members(project / "shards" / "raw", f"{split}-*.tar")


def times(project: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (project / "shards" / "raw").glob("*.tar")}


@pytest.fixture
def changing(tmp_path: Path, ppcl_data: Command) -> Path:
    """Thirty samples, sharded and encoded."""
    for number in range(30):
        put(tmp_path / "images", number, f"number {number}")
    write_recipe(tmp_path, **MORE)
    ppcl_data("shard", tmp_path)
    ppcl_data("encode", tmp_path)
    return tmp_path


def test_nothing_is_said_of_a_source_that_has_not_changed(changing: Path, ppcl_data: Command) -> None:
    for command in ("shard", "encode"):
        assert "source" not in ppcl_data(command, changing)
    before = times(changing)
    ppcl_data("shard", changing, "--update")
    assert times(changing) == before
    assert "already encoded" in ppcl_data("encode", changing)


@pytest.mark.parametrize("command", ["shard", "encode"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: (s / "3.txt").write_text("a corrected caption"), "1 changed (SOURCE/3.png)"),
        (lambda s: (s / "3.png").write_bytes(png(99)), "1 changed (SOURCE/3.png)"),
        (lambda s: (s / "3.json").write_text('{"caption_de": "drei"}'), "1 changed (SOURCE/3.png)"),
        (lambda s: put(s, 50, "new"), "1 new (SOURCE/50.png)"),
        (lambda s: (s / "without.png").write_bytes(png(51)), "1 new (SOURCE/without.png)"),
        (lambda s: (s / "7.png").unlink(), "1 gone (SOURCE/7.png)"),
        (lambda s: write_tar(s / "a.tar", {"x": {"png": png(52), "txt": b"x"}}), "1 new (SOURCE/a.tar)"),
        (lambda s: shutil.rmtree(s), "was not compared with the shards: SOURCE: no such file or folder"),
    ],
)
def test_a_change_is_said(changing: Path, ppcl_data: Command, command: str, change: Any, said: str) -> None:
    source = changing / "images"
    before = contents(changing)
    change(source)
    out = ppcl_data(command, changing)
    assert said.replace("SOURCE", str(source)) in out
    assert contents(changing) == before, "it is said and no more"
    if "compared" not in said:
        assert "--update" in out


def test_an_update_takes_what_is_new_or_changed_and_keeps_the_rest(changing: Path, ppcl_data: Command) -> None:
    source, raw = changing / "images", changing / "shards" / "raw"
    before, untouched = {split: contents(changing, split) for split in ("train", "heldout")}, times(changing)
    where = {name: path.name for path in raw.glob("*.tar") for name in members(raw, path.name)}
    put(source, 3, "a corrected caption")
    (source / "9.png").unlink()
    (source / "9.txt").unlink()
    for number in range(40, 46):
        put(source, number, f"number {number}")
    ppcl_data("shard", changing, "--update")
    after = {split: contents(changing, split) for split in ("train", "heldout")}
    together = after["train"] | after["heldout"]
    assert together["3.txt"] == b"a corrected caption"
    assert not {"9.png", "9.txt"} & together.keys()
    assert all(together[f"{number}.txt"] == f"number {number}".encode() for number in range(40, 46))
    for split, old in before.items():
        assert old.keys() - {"9.png", "9.txt"} <= after[split].keys(), "a sample stays in its split"
    rewritten = {where["3.txt"], where["9.txt"]}
    now = times(changing)
    assert {name: time for name, time in now.items() if name in untouched.keys() - rewritten} == {
        name: time for name, time in untouched.items() if name not in rewritten
    }
    assert now.keys() > untouched.keys()
    ppcl_data("encode", changing, "--json", changing / "e.json")
    encoded = json.loads((changing / "e.json").read_text())
    assert encoded["shards_encoded_now"] == len(rewritten) + len(now.keys() - untouched.keys())
    assert encoded["samples"] == 35
    texts = {n: data for n, data in members(changing / "shards" / "encoded").items() if n.endswith(".txt")}
    assert texts == {name: data for name, data in together.items() if name.endswith(".txt")}
    ppcl_data("verify", changing / "shards")


def test_a_shard_of_which_nothing_is_left_goes(changing: Path, ppcl_data: Command) -> None:
    raw = changing / "shards" / "raw"
    for name in members(raw, "train-000001.tar"):
        (changing / "images" / name).unlink()
    ppcl_data("shard", changing, "--update")
    ppcl_data("encode", changing)
    for folder in (raw, changing / "shards" / "encoded"):
        assert not (folder / "train-000001.tar").exists()
        assert "train-000001.tar" not in [entry["name"] for entry in index_of(folder)["shards"]]
    put(changing / "images", 60, "number 60")
    ppcl_data("shard", changing, "--update")
    assert contents(changing)["60.txt"] == b"number 60"


def test_what_was_skipped_is_taken_once_it_can_be(changing: Path, ppcl_data: Command) -> None:
    source = changing / "images"
    (source / "late.png").write_bytes(png(70))
    (source / "bad.png").write_bytes(b"nothing")
    (source / "bad.txt").write_text("bad")
    ppcl_data("shard", changing, "--update")
    assert len(index_of(changing / "shards" / "raw")["skipped"]) == 2
    (source / "late.txt").write_text("late")
    (source / "bad.png").write_bytes(png(71))
    assert "2 changed" in ppcl_data("shard", changing)
    ppcl_data("shard", changing, "--update")
    assert index_of(changing / "shards" / "raw")["skipped"] == []
    assert contents(changing)["late.txt"] == b"late"
    assert contents(changing)["bad.png"] == png(71)


def test_an_older_content_of_the_same_length_is_not_taken_for_the_new(changing: Path, ppcl_data: Command) -> None:
    caption = changing / "images" / "3.txt"
    stat = caption.stat()
    caption.write_text("NUMBER 3")
    ppcl_data("shard", changing, "--update")
    assert contents(changing)["3.txt"] == b"NUMBER 3"
    caption.write_text("number 3")
    os.utime(caption, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    ppcl_data("shard", changing, "--update")
    assert contents(changing)["3.txt"] == b"number 3"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_tables_and_shards_are_noticed_and_updated(tmp_path: Path, ppcl_data: Command, kind: str) -> None:
    source = tmp_path / f"t.{kind}"

    def write(count: int, caption: str) -> None:
        rows: list[dict[str, Any]] = [
            {"image": {"bytes": png(n), "path": None}, "text": f"{caption} {n}"} for n in range(count)
        ]
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
        elif kind == "tar":
            write_tar(source, {str(n): {"png": png(n), "txt": row["text"].encode()} for n, row in enumerate(rows)})
        else:
            for n in range(count):
                (tmp_path / f"{n}.png").write_bytes(png(n))
            source.write_text(
                "\n".join(json.dumps({"path": f"{n}.png", "text": r["text"]}) for n, r in enumerate(rows))
            )

    write(9, "old")
    write_recipe(tmp_path, source=str(source), **MORE)
    ppcl_data("shard", tmp_path)
    write(12, "new")
    assert f"1 changed ({source})" in ppcl_data("shard", tmp_path)
    ppcl_data("shard", tmp_path, "--update")
    stored = contents(tmp_path)
    texts = {stored[name.replace(".png", ".txt")].decode(): data for name, data in stored.items() if ".png" in name}
    assert texts == {f"new {n}": png(n) for n in range(12)}
    assert "source" not in ppcl_data("shard", tmp_path)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(["write", "caption", "delete", "uncaption"]), st.integers(0, 9), st.integers(0, 9)
            ),
            max_size=5,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_whatever_changes_an_update_holds_what_a_new_start_would(
    tmp_path: Path, ppcl_data: Command, rounds: list[list[tuple[str, int, int]]]
) -> None:
    for name in ("images", "shards", "anew"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    for number in range(20, 32):
        put(tmp_path / "images", number, f"number {number}")
    for changes in [[], *rounds]:
        for change, number, value in changes:
            image = tmp_path / "images" / f"{number}.png"
            if change == "write":
                put(tmp_path / "images", number, f"number {number}", value)
            elif change == "caption":
                image.with_suffix(".txt").write_text(f"caption {value}")
            else:
                (image if change == "delete" else image.with_suffix(".txt")).unlink(missing_ok=True)
        write_recipe(tmp_path, **MORE)
        ppcl_data("shard", tmp_path, "--update")
        shutil.rmtree(tmp_path / "anew", ignore_errors=True)
        updated = {split: contents(tmp_path, split) for split in ("train", "heldout")}
        skipped = index_of(tmp_path / "shards" / "raw")["skipped"]
        write_recipe(tmp_path, shards=str(tmp_path / "anew"), **MORE)
        ppcl_data("shard", tmp_path)
        assert updated == {s: members(tmp_path / "anew" / "raw", f"{s}-*.tar") for s in ("train", "heldout")}
        assert sorted(skipped) == sorted(index_of(tmp_path / "anew" / "raw")["skipped"])
