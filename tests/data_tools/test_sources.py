"""Promises about what `data.source` may be, and about samples in it that cannot be used."""

from __future__ import annotations

import csv
import functools
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet
import pytest

from data_tools import fetch
from tests.data_tools.conftest import Command, index_of, members, png, write_images, write_recipe, write_tar


def pictures(folder: Path, count: int) -> None:
    (folder / "pics").mkdir(parents=True)
    for number in range(count):
        (folder / "pics" / f"{number}.png").write_bytes(png(number))


def stored(project: Path, ppcl_data: Command, source: str | Path, **more: object) -> dict[str, bytes]:
    """What `shard` makes of a source: members by name; everything is for training."""
    write_recipe(project, source=str(source), heldout=0.0, **more)
    ppcl_data("shard", project)
    return members(project / "shards" / "raw")


def test_json_beside_an_image_holds_its_captions(tmp_path: Path, ppcl_data: Command) -> None:
    images = tmp_path / "images"
    images.mkdir()
    contents = {
        "one": {"caption": "a cat"},
        "several": {"caption_zh": "猫", "caption_en": "cat", "url": "x", "caption": "a cat", "caption_none": None},
        "no_main": {"prompt": "p", "caption_en": "cat", "caption_empty": " "},
        "both": {"caption_en": "cat"},
    }
    for number, (name, content) in enumerate(contents.items()):
        (images / f"{name}.png").write_bytes(png(number))
        (images / f"{name}.json").write_text(json.dumps(content))
    (images / "both.txt").write_text("from the text file")
    got = stored(tmp_path, ppcl_data, images)
    assert got["one.txt"] == b"a cat"
    assert "one.json" not in got
    assert got["several.txt"] == b"a cat"
    assert list(json.loads(got["several.json"]).items()) == [
        ("caption", "a cat"),
        ("caption_en", "cat"),
        ("caption_zh", "猫"),
    ]
    assert got["no_main.txt"] == b"cat"
    assert json.loads(got["no_main.json"]) == {"caption_en": "cat", "prompt": "p"}
    assert got["both.txt"] == b"from the text file"
    assert json.loads(got["both.json"]) == {"caption": "from the text file", "caption_en": "cat"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_table_has_paths_and_captions(tmp_path: Path, ppcl_data: Command, kind: str) -> None:
    pictures(tmp_path / "set", 6)
    rows = [
        {"id": n, "file_name": f"pics/{n}.png", "caption_zh": f"数 {n}", "caption_en": f"number {n}"} for n in range(5)
    ]
    rows.append({"id": 5, "file_name": str(tmp_path / "set/pics/5.png"), "caption_zh": None, "caption_en": "five"})
    table = tmp_path / "set" / f"table.{kind}"
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with table.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    got = stored(tmp_path, ppcl_data, table)
    assert {name for name in got if name.endswith(".png")} == {f"pics_{n}.png" for n in range(6)}
    assert got["pics_3.png"] == png(3)
    assert got["pics_3.txt"] == "数 3".encode(), "the first caption column"
    assert list(json.loads(got["pics_3.json"])) == ["caption_zh", "caption_en"]
    assert got["pics_5.txt"] == b"five"
    assert "pics_5.json" not in got


def test_a_table_without_its_columns_lists_what_it_has(tmp_path: Path, ppcl_data: Command) -> None:
    for line, message in (
        (
            {"url": 1, "caption": "x"},
            "no column of images (path, image, ",
        ),
        (
            {"path": "a.png", "words": "x"},
            "no column of captions (caption, text, prompt, each also with a language: caption_en; ",
        ),
    ):
        (tmp_path / "t.jsonl").write_text(json.dumps(line))
        write_recipe(tmp_path, source=str(tmp_path / "t.jsonl"))
        assert message in ppcl_data.fail("shard", tmp_path)
    (tmp_path / "t.jsonl").write_text("")
    assert "t.jsonl is empty" in ppcl_data.fail("shard", tmp_path)


def test_rows_that_cannot_be_used_are_named(tmp_path: Path, ppcl_data: Command) -> None:
    pictures(tmp_path, 3)
    (tmp_path / "pics" / "a.xcf").write_bytes(b"")
    lines = [
        json.dumps({"path": "pics/0.png", "caption": "zero"}),
        "{",
        json.dumps({"path": "pics/gone.png", "caption": "x"}),
        json.dumps({"path": None, "caption": "x"}),
        json.dumps({"path": "pics/1.png", "caption": "  "}),
        json.dumps({"path": "pics/2.png"}),
        json.dumps({"path": "pics/a.xcf", "caption": "x"}),
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    got = stored(tmp_path, ppcl_data, tmp_path / "t.jsonl", max_bad_fraction=0.9)
    assert got.keys() == {"pics_0.png", "pics_0.txt"}
    skipped = index_of(tmp_path / "shards" / "raw")["skipped"]
    for line, (number, why) in zip(
        skipped,
        [
            (2, "not a JSON object"),
            (3, "No such file"),
            (4, "it has no path"),
            (5, "empty"),
            (6, "no caption"),
            (7, "not a kind"),
        ],
        strict=True,
    ):
        assert line.startswith(f"{tmp_path / 't.jsonl'}:{number}: ")
        assert why in line


def test_a_csv_that_is_not_utf8_costs_only_its_bad_rows(tmp_path: Path, ppcl_data: Command) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "t.csv").write_bytes(b"path,caption\npics/0.png,caf\xe9\npics/1.png,plain\n")
    got = stored(tmp_path, ppcl_data, tmp_path / "t.csv", max_bad_fraction=0.6)
    assert got.keys() == {"pics_1.png", "pics_1.txt"}
    assert "not UTF-8" in index_of(tmp_path / "shards" / "raw")["skipped"][0]


def shard_files(folder: Path) -> None:
    """Three foreign shards of four samples."""
    for number in range(3):
        samples = {
            f"{number}{own}": {
                "png": png(number * 4 + own),
                "txt": f"caption {number}{own}".encode(),
                "json": json.dumps({"caption": f"caption {number}{own}", "caption_de": "Bild", "width": 8}).encode(),
                "cls": b"3",
            }
            for own in range(4)
        }
        write_tar(folder / f"{number:02d}.tar", samples)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves the folder `remote`."""
    (tmp_path / "remote").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "remote")))
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}"
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize("kind", ["local", "star", "http", "pipe"])
def test_webdataset_shards_are_packed_anew(tmp_path: Path, ppcl_data: Command, kind: str, server: str) -> None:
    remote = tmp_path / "remote"
    shard_files(remote)
    source = {
        "local": f"{remote}/{{00..02}}.tar",
        "star": f"{remote}/*.tar",
        "http": f"{server}/{{00..02}}.tar",
        "pipe": f"pipe:cat {remote}/{{00..02}}.tar",
    }[kind]
    got = stored(tmp_path, ppcl_data, source)
    assert len(got) == 3 * 12
    for number in range(12):
        key = f"{number // 4}{number % 4}"
        stored_key = f"{number // 4:02d}_{key}"
        assert got[f"{stored_key}.png"] == png(number)
        assert got[f"{stored_key}.txt"] == f"caption {key}".encode()
        assert json.loads(got[f"{stored_key}.json"]) == {"caption": f"caption {key}", "caption_de": "Bild"}
    assert sorted(path.name for path in (tmp_path / "shards" / "raw").iterdir() if path.suffix != ".tar") == [
        ".journal.jsonl",
        ".source.json",
        "index.json",
    ]


@pytest.mark.parametrize("address", ["", "pipe:cat "])
def test_shards_that_number_their_samples_anew_are_told_apart(tmp_path: Path, ppcl_data: Command, address: str) -> None:
    for shard in range(2):
        write_tar(tmp_path / "in" / f"{shard}.tar", {"000000": {"png": png(shard), "txt": f"of {shard}".encode()}})
    got = stored(tmp_path, ppcl_data, f"{address}{tmp_path}/in/{{0..1}}.tar")
    assert got == {
        f"{shard}_000000.{suffix}": content
        for shard in range(2)
        for suffix, content in (("png", png(shard)), ("txt", f"of {shard}".encode()))
    }


def test_a_shard_that_cannot_be_fetched_is_named(
    tmp_path: Path, ppcl_data: Command, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "WAITS", (0.01, 0.02))
    shard_files(tmp_path / "remote")
    write_recipe(tmp_path, source=f"{server}/{{01..03}}.tar")
    assert f"{server}/03.tar: cannot be fetched after 3 tries" in ppcl_data.fail("shard", tmp_path)
    count = tmp_path / "count"
    comes_late = f"pipe:echo >> {count}; test $(wc -l < {count}) = 3 && cat {tmp_path}/remote/01.tar"
    write_recipe(tmp_path, source=comes_late, heldout=0.0)
    ppcl_data("shard", tmp_path)
    assert len(members(tmp_path / "shards" / "raw")) == 3 * 4, "a shard that comes at the third try is as good"
    (tmp_path / "shards" / "raw").rename(tmp_path / "elsewhere")
    write_recipe(tmp_path, source="pipe:false")
    assert "pipe:false: cannot be fetched" in ppcl_data.fail("shard", tmp_path)
    assert not (tmp_path / "shards" / "raw").exists()


def test_damaged_shards_cost_only_their_own_samples(tmp_path: Path, ppcl_data: Command) -> None:
    write_tar(tmp_path / "in" / "a.tar", {f"a{n}": {"png": png(n), "txt": b"a"} for n in range(6)})
    whole = (tmp_path / "in" / "a.tar").read_bytes()
    (tmp_path / "in" / "a.tar").write_bytes(whole[: 4 * 2048 + 600])
    write_tar(tmp_path / "in" / "b.tar", {"../../evil": {"png": png(), "txt": b"b"}, "b0": {"png": png(), "txt": b"b"}})
    write_tar(tmp_path / "in" / "c.tar", {"c0": {"png": png()}, "c1": {"txt": b"no image"}})
    got = stored(tmp_path, ppcl_data, tmp_path / "in" / "{a,b,c}.tar", max_bad_fraction=0.9)
    assert {name for name in got if name.endswith(".png")} == {
        *(f"a_a{number}.png" for number in range(4)),
        "b_b0.png",
    }
    skipped = "\n".join(index_of(tmp_path / "shards" / "raw")["skipped"])
    for named in ("a.tar:", "cut short", "b.tar:../../evil", "c.tar:c0: no caption", "c.tar:c1: no image"):
        assert named in skipped
    assert not (tmp_path.parent / "evil.png").exists()


def test_samples_of_every_bad_kind_are_skipped_counted_and_named(tmp_path: Path, ppcl_data: Command) -> None:
    write_images(tmp_path / "images")
    images = tmp_path / "images"
    bad = {
        "missing.png": (png(), None),
        "latin.png": (png(), b"caf\xe9"),
        "empty.png": (png(), b" \n"),
        "text.png": (b"no image", b"text"),
        "hollow.jpg": (b"", b"hollow"),
    }
    for name, (data, caption) in bad.items():
        (images / name).write_bytes(data)
        if caption is not None:
            (images / name).with_suffix(".txt").write_bytes(caption)
    (images / "dangling.png").symlink_to("nowhere.png")
    (images / "list.png").write_bytes(png())
    (images / "list.json").write_text("[]")
    write_recipe(tmp_path, max_bad_fraction=0.2)
    out = ppcl_data("shard", tmp_path)
    skipped = index_of(tmp_path / "shards" / "raw")["skipped"]
    for name, why in {
        "missing.png": f"it has no caption; write one to {images / 'missing.txt'}",
        "latin.png": "not UTF-8",
        "empty.png": "caption is empty",
        "text.png": "is no image",
        "hollow.jpg": "is no image",
        "dangling.png": "cannot be read (No such file or directory)",
        "list.png": "not a JSON object",
    }.items():
        assert any(line.startswith(f"{images / name}: ") and why in line for line in skipped), (name, skipped)
    assert len(skipped) == 7
    assert "7 skipped" in out
    assert (tmp_path / "shards" / "raw" / "skipped.log").read_text().splitlines() == skipped


def test_too_many_bad_samples_end_the_command(tmp_path: Path, ppcl_data: Command) -> None:
    write_images(tmp_path / "images")
    for number in range(12):
        (tmp_path / "images" / f"bad{number:02d}.png").write_bytes(b"no image")
        (tmp_path / "images" / f"bad{number:02d}.txt").write_text("x")
    write_recipe(tmp_path, samples_per_shard=100, heldout=0.0)
    error = ppcl_data.fail("shard", tmp_path)
    assert "12 of 42 samples cannot be used, more than data.max_bad_fraction (0.05)" in error
    assert error.count("is no image") == 10, "ten are named"
    assert not (tmp_path / "shards" / "raw").exists()
    assert len((tmp_path / "shards" / "raw.partial" / "skipped.log").read_text().splitlines()) == 12


def test_what_is_not_there_yet_is_named(tmp_path: Path, ppcl_data: Command) -> None:
    assert f"{tmp_path / 'nowhere' / 'recipe.yaml'}: no such file" in ppcl_data.fail("shard", tmp_path / "nowhere")
    write_recipe(tmp_path)
    assert "run `ppcl-data shard RECIPE` first" in ppcl_data.fail("encode", tmp_path)
    for source, message in {
        "nowhere": "nowhere: no such file or folder",
        "t.csv": "no such file",
        "{00..01}.tar": "00.tar: no such file",
        "{{00..01}.tar": "error: ",
    }.items():
        write_recipe(tmp_path, source=str(tmp_path / source))
        assert message in ppcl_data.fail("shard", tmp_path)
    (tmp_path / "nowhere").mkdir()
    write_recipe(tmp_path, source=str(tmp_path / "nowhere"))
    assert "nowhere: no images" in ppcl_data.fail("shard", tmp_path)
