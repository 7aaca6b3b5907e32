"""Promises about messages: whatever lies in a source, they are short, can be printed, and hold no image's bytes."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppcl_ds.errors import UserError, brief, problem, shown
from tests.data_tools.conftest import Command, png, write_recipe, write_tar

BYTES = os.urandom(300_000)
LONG = "word " * 100_000


def jsonl(folder: Path, *rows: object) -> Path:
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "t.jsonl"


def parquet(folder: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
    return folder / "t.parquet"


def tar(folder: Path, name: str) -> Path:
    with tarfile.open(folder / "t.tar", "w") as file:
        member = tarfile.TarInfo(name)
        member.size = 3
        file.addfile(member, io.BytesIO(b"abc"))
    return folder / "t.tar"


def csv(folder: Path, text: str) -> Path:
    (folder / "t.csv").write_text(text)
    return folder / "t.csv"


def folder_of_names(folder: Path, name: bytes) -> Path:
    (folder / "in").mkdir()
    for suffix, data in ((b".png", b"no image"), (b".txt", b"x")):
        Path(os.fsdecode(os.fsencode(folder / "in") + b"/" + name + suffix)).write_bytes(data)
    return folder / "in"


SOURCES: dict[str, Callable[[Path], Path]] = {
    "a path that is a text": lambda f: jsonl(f, *[{"path": LONG, "text": "x"}] * 50),
    "a path that is an object": lambda f: jsonl(f, *[{"path": {"a": LONG}, "text": "x"}] * 50),
    "a caption that is an object": lambda f: jsonl(f, *[{"path": "a.png", "text": {"a": LONG}}] * 50),
    "names of columns": lambda f: jsonl(f, {LONG + str(n): "x" for n in range(20)}),
    "many columns": lambda f: jsonl(f, {f"column {n}": "x" for n in range(50_000)}),
    "bytes": lambda f: parquet(f, image=[BYTES] * 20, text=["x"] * 20),
    "a struct": lambda f: parquet(f, image=[{"bytes": BYTES, "path": LONG}] * 20, text=["x"] * 20),
    "a struct without bytes": lambda f: parquet(f, image=[{"bytes": None, "path": LONG}] * 20, text=["x"] * 20),
    "bytes as captions": lambda f: parquet(f, path=["a.png"] * 20, text=[BYTES] * 20),
    "a struct of something else": lambda f: parquet(f, image=[{"data": BYTES}] * 20, text=["x"] * 20),
    "a row": lambda f: csv(f, f'path,text\n"{LONG}\n' * 20),
    "a first line": lambda f: csv(f, f"{LONG},{LONG}\n1,2\n"),
    "a member": lambda f: tar(f, "a/" * 5_000 + "b.png"),
    "a member with control characters": lambda f: tar(f, "a\x1b[31m\n\r\x07.xcf"),
    "a name": lambda f: folder_of_names(f, b"x" * 200),
    "a name that is no text": lambda f: folder_of_names(f, b"\xff\xfe\x1b[31m\n"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_messages_and_logs_are_bounded(tmp_path: Path, ppcl_data: Command, kind: str) -> None:
    source = SOURCES[kind](tmp_path)
    for allowed in (0.0, 0.99):
        write_recipe(tmp_path, source=str(source), heldout=0.0, max_bad_fraction=allowed)
        error = ppcl_data.fail("shard", tmp_path)
        assert len(error) < 4200
        assert error[:-1].isprintable()
        for log in (tmp_path / "shards").rglob("skipped.log"):
            lines = log.read_text().split("\n")
            assert all(len(line) < 800 and line.isprintable() for line in lines)


def test_what_other_commands_say_is_bounded_too(tmp_path: Path, ppcl_data: Command) -> None:
    bad = {
        f"{n}": {"png": BYTES[:1000], "txt": b"\xff" * 1000, "json": json.dumps({LONG[:9000]: LONG[:9000]}).encode()}
        for n in range(400)
    }
    write_tar(tmp_path / "s" / "train-0.tar", bad | {"good": {"png": png(), "txt": b"x"}})
    ppcl_data("index", tmp_path / "s")
    for command in ("verify", "inspect"):
        code, out, err = ppcl_data.run(command, tmp_path / "s")
        assert code == (command == "verify")
        assert len(out) < 40_000, "not all 400 are printed"
        assert max(map(len, (out + err).split("\n"))) < 400


@given(st.text(), st.integers(40, 400))
def test_whatever_is_shown_is_short_and_can_be_printed(text: str, most: int) -> None:
    line = shown(text, most)
    assert line.isprintable()
    line.encode()
    assert len(shown("x" + text * 50, most)) <= most + 10
    if text.isprintable() and len(text) <= most:
        assert line == text
    assert problem(text, ValueError(text)).isprintable()


def test_a_message_is_bounded_wherever_it_comes_from() -> None:
    assert len(str(UserError(LONG))) < 4200
    assert len(brief(ValueError(LONG))) < 400
    assert problem("a.png", OSError(2, "No such file", "a.png")) == "a.png: cannot be read (No such file)"
    assert len(problem(LONG, LONG)) < 800
