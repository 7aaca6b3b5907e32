"""Promises about other people's data: every image comes with its own captions, or is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
import tarfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.samples import captions_in, is_caption
from tests.data_tools.conftest import Command, index_of, members, png, write_recipe, write_tar


def number_of(data: bytes) -> int:
    """Which image it is, by its colour (see `png`)."""
    image = Image.open(io.BytesIO(data))
    red, green, _ = image.convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    return int(red) + 256 * int(green)


class Stored:
    """What `shard` made of a source; everything is for training.

    Attributes:
        pairs: number of the image -> its captions, the main one first.
        keys: of all samples.
        skipped: lines.
    """

    def __init__(self, project: Path, ppcl_data: Command, source: Any, bad: float = 0.9, **more: Any) -> None:
        source = [str(one) for one in source] if isinstance(source, list) else str(source)
        write_recipe(project, source=source, heldout=0.0, max_bad_fraction=bad, **more)
        self.out = ppcl_data("shard", project)
        stored = members(project / "shards" / "raw")
        self.keys = {name.rpartition(".")[0] for name in stored}
        self.pairs: dict[int, list[str]] = {}
        for name, data in stored.items():
            key, _, suffix = name.rpartition(".")
            if suffix not in ("txt", "json"):
                captions = [stored[f"{key}.txt"].decode()]
                if f"{key}.json" in stored:
                    every = list(json.loads(stored[f"{key}.json"]).values())
                    assert every[0] == captions[0]
                    captions = every
                assert number_of(data) not in self.pairs
                self.pairs[number_of(data)] = captions
        self.skipped: list[str] = index_of(project / "shards" / "raw")["skipped"]


def images(folder: Path, names: Sequence[str], captions: bool = True) -> Path:
    """Files with these names, number n with the caption `number n`."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
        if captions:
            (path.parent / f"{path.name.rpartition('.')[0]}.txt").write_text(f"number {number}")
    return folder


def expected(count: int) -> dict[int, list[str]]:
    return {number: [f"number {number}"] for number in range(count)}


# Keys


SYMBOLS = [
    "\N{CAT FACE}",
    "\N{DOG FACE}",
    "img (1)",
    "img [1]",
    "img_1",
    "a/b",
    "a_b",
    "a b",
    "a.b",
    "été",
    "e\u0301te\u0301",
]


def test_names_that_differ_in_what_keys_lose_get_keys_of_their_own(tmp_path: Path, ppcl_data: Command) -> None:
    source = images(tmp_path / "in", [f"{name}.png" for name in SYMBOLS])
    stored = Stored(tmp_path, ppcl_data, source)
    assert stored.pairs == expected(len(SYMBOLS))
    assert len(stored.keys) == len(SYMBOLS)
    assert "img_1" in stored.keys, "a name that nothing collides with is its own key"
    again = Stored(tmp_path, ppcl_data, shutil.move(source, tmp_path / "moved"))
    assert again.keys == stored.keys, "where the source lies does not matter"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.sampled_from("aA._ -()[]éß猫\N{CAT FACE}\u0301\n'\"#%&$`"), min_size=1, max_size=4),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_the_names_pairs_stay_together(tmp_path: Path, ppcl_data: Command, names: list[str]) -> None:
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    shutil.rmtree(tmp_path / "shards", ignore_errors=True)
    wanted = list(dict.fromkeys(name for name in names if not name.startswith("."))) or ["a"]
    source = images(tmp_path / "in", [f"{name}.png" for name in wanted])
    assert Stored(tmp_path, ppcl_data, source).pairs == expected(len(wanted))


def test_two_sources_may_have_the_same_names(tmp_path: Path, ppcl_data: Command) -> None:
    for folder in range(3):
        (tmp_path / str(folder)).mkdir()
        (tmp_path / str(folder) / "a.png").write_bytes(png(folder))
        (tmp_path / str(folder) / "a.txt").write_text(f"number {folder}")
    assert Stored(tmp_path, ppcl_data, [tmp_path / str(folder) for folder in range(3)]).pairs == expected(3)


@pytest.mark.parametrize(("wanted", "number"), [((), None), (("jpg", "png"), 1), (("png",), 0), (("webp", "jpg"), 1)])
def test_of_two_images_of_one_name_the_recipe_chooses(
    tmp_path: Path, ppcl_data: Command, wanted: tuple[str, ...], number: int | None
) -> None:
    source = images(tmp_path / "in", ["other.png"])
    (source / "a.png").write_bytes(png(0))
    Image.new("RGB", (8, 8), (1, 0, 7)).save(source / "a.JPG", quality=100, subsampling=0)
    (source / "a.txt").write_text("of a")
    (source / "other.png").write_bytes(png(9))
    stored = Stored(tmp_path, ppcl_data, source, image_suffixes=list(wanted))
    if number is None:
        assert stored.pairs == {9: ["number 0"]}
        assert "it has 2 images (a.JPG, a.png); `data.image_suffixes` says which" in stored.skipped[0]
    else:
        assert abs(min(stored.pairs) - number) <= 1
        assert "of a" in stored.pairs[min(stored.pairs)]


def test_names_of_shards_may_have_dots(tmp_path: Path, ppcl_data: Command) -> None:
    write_tar(
        tmp_path / "in" / "a.tar",
        {
            "photo": {"v1.png": png(0), "v1.txt": b"number 0", "v2.png": png(1), "v2.txt": b"number 1"},
            "one": {"front.png": png(2), "txt": b"number 2"},
            "two": {"front.png": png(3), "mask.png": png(4), "txt": b"of two"},
            "three": {"image.png": png(5), "caption.txt": b"number 5"},
            "many": {"png": png(6), "a.txt": b"a", "b.txt": b"b"},
        },
    )
    stored = Stored(tmp_path, ppcl_data, tmp_path / "in" / "a.tar")
    assert stored.pairs == {n: [f"number {n}"] for n in (0, 1, 2, 5)}
    assert [line.partition("a.tar:")[2] for line in stored.skipped] == [
        "two: it has 2 images (front.png, mask.png); `data.image_suffixes` says which one is read",
        "many: it has several captions (a.txt, b.txt)",
    ]
    chosen = Stored(tmp_path, ppcl_data, tmp_path / "in" / "a.tar", image_suffixes=["front.png", "png"])
    assert chosen.pairs[3] == ["of two"]


@pytest.mark.parametrize("prefix", ["", "./"])
def test_what_macos_adds_to_a_tar_is_passed_over(tmp_path: Path, ppcl_data: Command, prefix: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(4):
            for suffix, data in (("png", png(number)), ("txt", f"number {number}".encode())):
                for name in (f"._{number}.{suffix}", f"__MACOSX/sub/._{number}.{suffix}", f"{number}.{suffix}"):
                    member = tarfile.TarInfo(prefix + name)
                    content = b"\0\5\x16\7" + b"x" * 60 if "._" in name else data
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    stored = Stored(tmp_path, ppcl_data, tmp_path / "a.tar", bad=0.0)
    assert stored.pairs == expected(4)
    assert stored.keys == {f"a_{number}" for number in range(4)}


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path, ppcl_data: Command) -> None:
    source = images(tmp_path / "in", ["a.png", "b/c.png"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "d.png").write_bytes(png(2))
    (elsewhere / "d.txt").write_text("number 2")
    (source / "more").symlink_to(elsewhere)
    (source / "b" / "up").symlink_to(source)
    (elsewhere / "self").symlink_to(elsewhere)
    (source / "__MACOSX").mkdir()
    (source / "__MACOSX" / "x.png").write_bytes(b"")
    stored = Stored(tmp_path, ppcl_data, source, bad=0.0)
    assert stored.pairs == expected(3)
    assert "more_d" in stored.keys


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.tar", gzip.compress(b"x" * 99, mtime=0), "it is compressed (gzip); unpack it first"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "it is compressed (gzip); unpack it first"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.csv", b"PK\3\4" + b"x" * 50, "it is compressed (zip); unpack it first"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "is a file, and .gz is none that is read"),
        ("a.tsv", b"path\ttext\n", "is a file, and .tsv is none that is read"),
        ("a.json", b"{}", "is a file, and .json is none that is read"),
        ("a", b"", "is a file, and a name without suffix is none that is read"),
        ("b.parquet", b"nothing of the kind", "b.parquet is no parquet file"),
    ],
)
def test_a_file_that_is_something_else_is_said_so(
    tmp_path: Path, ppcl_data: Command, name: str, content: bytes, why: str
) -> None:
    (tmp_path / name).write_bytes(content)
    write_recipe(tmp_path, source=str(tmp_path / name))
    error = ppcl_data.fail("shard", tmp_path)
    assert why in error
    assert "no such" not in error


def test_a_relative_source_that_is_not_there_is_said_from_where(
    tmp_path: Path, ppcl_data: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("wrong/images", "wrong/{0..3}.tar", "wrong/*.parquet"):
        write_recipe(tmp_path, source=source)
        assert f", seen from {tmp_path}; " in ppcl_data.fail("shard", tmp_path)


# Captions


@pytest.mark.parametrize(
    "name",
    [
        "caption",
        "text",
        "prompt",
        "caption_en",
        "text_zh",
        "caption_zh_hans",
        "prompt-pt-BR",
        "caption_2",
        "text_de_3",
        "TEXT",
    ],
)
def test_captions_by_their_usual_names(name: str) -> None:
    assert is_caption(name)
    assert captions_in({name: "x", "other": "y"}) == {name: "x"}


@pytest.mark.parametrize(
    "name",
    [
        "caption_model",
        "caption_lang",
        "caption_source",
        "caption_id",
        "caption_score",
        "texture",
        "text_length",
        "captions",
        "",
    ],
)
def test_columns_that_are_no_captions(name: str) -> None:
    assert captions_in({name: "blip2-opt", "caption": "a cat"}) == {"caption": "a cat"}


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "tar"])
def test_the_recipe_says_which_columns_are_captions(tmp_path: Path, ppcl_data: Command, kind: str) -> None:
    rows = [
        {
            "image": f"{n}.png",
            "caption": f"no {n}",
            "short": f"s {n}",
            "long": [f"l {n}", f"m {n}"],
            "caption_model": "blip",
        }
        for n in range(3)
    ]
    source = images(tmp_path / "in", [f"{n}.png" for n in range(3)], captions=False)
    if kind == "json":
        for n, row in enumerate(rows):
            (source / f"{n}.json").write_text(json.dumps(row))
    elif kind == "tar":
        write_tar(
            source / "a.tar", {str(n): {"png": png(n), "json": json.dumps(row).encode()} for n, row in enumerate(rows)}
        )
        source /= "a.tar"
    elif kind == "jsonl":
        source /= "t.jsonl"
        source.write_text("\n".join(map(json.dumps, rows)))
    else:
        source /= "t.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    assert Stored(tmp_path, ppcl_data, source).pairs == {n: [f"no {n}"] for n in range(3)}
    given_columns = Stored(tmp_path, ppcl_data, source, caption_columns=["long", "short"])
    assert given_columns.pairs == {n: [f"l {n}", f"m {n}", f"s {n}"] for n in range(3)}
    ppcl_data("encode", tmp_path)
    ppcl_data("verify", tmp_path / "shards")
    encoded = members(tmp_path / "shards" / "encoded")
    assert (
        sum(next(iter(json.loads(data).values())).startswith("l ") for n, data in encoded.items() if n.endswith("json"))
        == 3
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=5), max_size=4), st.text(max_size=5))
def test_every_text_of_a_list_is_a_caption_of_its_own(texts: list[str], more: str) -> None:
    every = [text for text in [*texts, more] if text.strip()]
    why, got = "", {}
    try:
        got = captions_in({"text": texts, "text_2": more}, ["text", "text_2"])
    except ValueError as fault:
        why = str(fault)
    if any("\0" in text for text in every):
        assert "NUL" in why
    elif every:
        assert list(got.values()) == every
        assert all(map(is_caption, got))
    else:
        assert "no caption" in why or "empty" in why


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (5, "its `caption` is a number"),
        ({"en": "a"}, "its `caption` is an object"),
        ([{"en": "a"}], "its `caption` is an object"),
        (float("nan"), "it has no caption"),
        (None, "it has no caption"),
        ([], "it has no caption"),
        (["", " "], "its caption is empty"),
        ("a\0b", "NUL"),
        ("\ud800", "not UTF-8"),
        (b"\x89PNG", "its `caption` is bytes"),
    ],
)
def test_a_caption_that_is_none_says_what_it_is(value: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        captions_in({"caption": value})


def test_utf16_captions_are_named(tmp_path: Path, ppcl_data: Command) -> None:
    source = images(tmp_path / "in", ["a.png", "b.png", "c.png"])
    (source / "b.txt").write_bytes("with a mark".encode("utf-16"))
    (source / "c.txt").write_bytes("without".encode("utf-16-le"))
    stored = Stored(tmp_path, ppcl_data, source)
    assert stored.pairs == expected(1)
    assert sorted(line.partition(": ")[2] for line in stored.skipped) == [
        "its caption (.txt) is not UTF-8",
        "its caption `caption` has NUL characters; is it UTF-16?",
    ]


def test_several_rows_of_an_image_are_its_captions(tmp_path: Path, ppcl_data: Command) -> None:
    images(tmp_path, ["a.png", "b.png"], captions=False)
    rows = [
        ("a.png", "one"),
        ("b.png", "two"),
        ("./a.png", "three"),
        (str(tmp_path / "a.png"), "one"),
        ("././a.png", "four"),
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"path": p, "text": t}) for p, t in rows))
    stored = Stored(tmp_path, ppcl_data, tmp_path / "t.jsonl", bad=0.0)
    assert stored.pairs == {0: ["one", "three", "four"], 1: ["two"]}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("suffixes", [("png", "txt"), ("PNG", "Txt"), ("JPG", "TXT"), ("jfif", "JSON"), ("jpe", "txt")])
def test_captions_are_matched_by_letter_whatever_the_form_and_case(
    tmp_path: Path, ppcl_data: Command, form: Literal["NFC", "NFD"], suffixes: tuple[str, str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    other: Literal["NFC", "NFD"] = "NFD" if form == "NFC" else "NFC"
    for number, name in enumerate(("café", "Ångström", "plain")):
        (source / f"{unicodedata.normalize(form, name)}.{suffixes[0]}").write_bytes(png(number))
        caption = source / f"{unicodedata.normalize(other, name)}.{suffixes[1]}"
        text = f"number {number}"
        caption.write_text(json.dumps({"caption": text}) if suffixes[1] == "JSON" else text)
    stored = Stored(tmp_path, ppcl_data, source, bad=0.0)
    assert stored.pairs == expected(3)
    assert stored.keys == {"café", "Ångström", "plain"}


def test_two_captions_for_one_image_are_named(tmp_path: Path, ppcl_data: Command) -> None:
    source = images(tmp_path / "in", ["a.png", "b.png"])
    (source / "b.TXT").write_text("another")
    stored = Stored(tmp_path, ppcl_data, source)
    assert stored.pairs == expected(1)
    assert "it has two captions, b.TXT and b.txt" in stored.skipped[0]


@pytest.mark.parametrize("suffix", ["xcf", "psd", "svg", "avi", "pdf", "", "png_"])
def test_a_file_with_a_caption_that_cannot_be_used_is_named(tmp_path: Path, ppcl_data: Command, suffix: str) -> None:
    source = images(tmp_path / "in", ["a.png"])
    name = f"b.{suffix}".rstrip(".")
    (source / name).write_bytes(b"something")
    (source / "b.txt").write_text("something")
    (source / "lonely.txt").write_text("nothing beside it")
    stored = Stored(tmp_path, ppcl_data, source)
    assert stored.pairs == expected(1)
    assert stored.skipped[0].startswith(f"{source / name}: it has a caption, but is not a kind of image that is read")
    assert f"1 captions without an image beside them, such as {source / 'lonely.txt'}" in stored.out


# CSV


def rows_csv(path: Path, captions: Sequence[str]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text"), *((f"{n}.png", text) for n, text in enumerate(captions))])


def test_an_unclosed_quote_costs_its_own_row(tmp_path: Path, ppcl_data: Command) -> None:
    images(tmp_path, [f"{n}.png" for n in range(6)], captions=False)
    lines = [
        "path,text",
        '0.png,"so called',
        "1.png,number 1",
        '2.png,"number 2"',
        '3.png,"two\nlines"',
        '4.png,"x" y',
        "5.png,a, b",
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    stored = Stored(tmp_path, ppcl_data, tmp_path / "t.csv")
    assert stored.pairs == {1: ["number 1"], 2: ["number 2"], 3: ["two\nlines"]}
    assert [int(line.split(":")[1]) for line in stored.skipped] == [2, 7, 8]
    assert "3 fields, the first line has 2" in stored.skipped[-1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.sampled_from('ab ",\n\r;'), max_size=8), min_size=1, max_size=6), st.data())
def test_whatever_a_csv_holds_no_caption_holds_another_row(
    tmp_path: Path, ppcl_data: Command, captions: list[str], data: st.DataObject
) -> None:
    from data_tools.tables import Row, rows_of

    captions = [f"{n}:{text.strip()}" for n, text in enumerate(captions)]
    rows_csv(tmp_path / "t.csv", captions)
    whole = (tmp_path / "t.csv").read_text()
    got = [row for _, row in rows_of(tmp_path / "t.csv", ())[1]]
    assert [row["text"] for row in got if isinstance(row, Row)] == captions, "what the csv module wrote is read back"
    place = data.draw(st.integers(len("path,text\r\n"), len(whole)))
    (tmp_path / "t.csv").write_text(whole[:place] + '"' + whole[place:])
    for _, row in rows_of(tmp_path / "t.csv", ())[1]:
        if isinstance(row, Row) and isinstance(row.get("text"), str):
            assert sum(f"{n}.png," in row["text"] for n in range(len(captions))) == 0


# Hugging Face and img2dataset


def hf_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": png(n), "path": f"{n}.png"}, "text": f"number {n}", "url": "x"}
        for n in range(start, start + count)
    ]


@pytest.mark.parametrize("how", ["struct", "binary", "large", "no path", "beside a path"])
def test_parquet_holds_the_images(tmp_path: Path, ppcl_data: Command, how: str) -> None:
    rows = hf_rows(150)
    if how == "no path":
        rows = [{**row, "image": {"bytes": row["image"]["bytes"], "path": None}} for row in rows]
    if how == "beside a path":
        rows = [{"path": "elsewhere.png", **row} for row in rows]
    table = pyarrow.Table.from_pylist(rows)
    if how in ("binary", "large"):
        kind = pyarrow.binary() if how == "binary" else pyarrow.large_binary()
        data = pyarrow.array([row["image"]["bytes"] for row in rows], kind)
        table = pyarrow.table({"image": data, "text": [row["text"] for row in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet", row_group_size=40)
    stored = Stored(tmp_path, ppcl_data, tmp_path / "train.parquet", bad=0.0)
    assert stored.pairs == expected(150)
    assert not list((tmp_path / "shards" / "raw").glob("fetched*")), "nothing is left over"


def test_rows_of_a_parquet_that_cannot_be_used_are_named_without_their_bytes(
    tmp_path: Path, ppcl_data: Command
) -> None:
    images(tmp_path / "in", ["0.png", "1.png"], captions=False)
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": None, "path": "0.png"}, "caption": ["number 0"]},
        {"image": {"bytes": os.urandom(100_000), "path": "1.png"}, "caption": ["one"]},
        {"image": {"bytes": None, "path": "gone.png"}, "caption": ["two"]},
        {"image": None, "caption": ["three"]},
        {"image": {"bytes": png(4), "path": None}, "caption": []},
        {"image": {"bytes": png(5)[:60], "path": None}, "caption": ["five"]},
        {"image": {"bytes": png(6), "path": None}, "caption": ["six", "six again"]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in" / "t.parquet")
    stored = Stored(tmp_path, ppcl_data, tmp_path / "in" / "t.parquet")
    assert stored.pairs == {0: ["number 0"], 6: ["six", "six again"], **({5: ["five"]} if 5 in stored.pairs else {})}
    whys = ["no image in", "cannot be read (No such file", "the image is missing", "it has no caption"]
    for number, why in zip((2, 3, 4, 5), whys, strict=True):
        assert any(f"t.parquet:{number}: " in line and why in line for line in stored.skipped), stored.skipped
    assert max(map(len, stored.skipped)) < 500


@pytest.mark.parametrize("layout", ["folder", "braces", "star", "list"])
def test_parquet_in_several_files(tmp_path: Path, ppcl_data: Command, layout: str) -> None:
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    names = [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    for n, name in enumerate(names):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(hf_rows(5, 5 * n)), data / name)
    (tmp_path / "hub" / "README.md").write_text("a card")
    (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    source: Any = {
        "folder": tmp_path / "hub",
        "braces": data / "train-{00000..00002}-of-00003.parquet",
        "star": data / "train-*.parquet",
        "list": [data / name for name in names],
    }[layout]
    assert Stored(tmp_path, ppcl_data, source, bad=0.0).pairs == expected(15)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_imagefolder_with_metadata(tmp_path: Path, ppcl_data: Command, kind: str) -> None:
    source = tmp_path / "in"
    for split in range(2):
        folder = images(source / f"split{split}", [], captions=False)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"file_name": f"{n}.png", "text": f"number {n}"} for n in range(5 * split, 5 * split + 5)]
        for row in rows:
            (folder / row["file_name"]).write_bytes(png(int(row["file_name"][:-4])))
        if kind == "jsonl":
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        elif kind == "csv":
            with (folder / "metadata.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")
    (source / "split0" / "not in it.png").write_bytes(png(99))
    stored = Stored(tmp_path, ppcl_data, source)
    assert stored.pairs == expected(10)
    assert len(stored.skipped) == 1
    assert "not in it.png: it has no caption" in stored.skipped[0]


def test_a_folder_of_tars_as_img2dataset_leaves_it(tmp_path: Path, ppcl_data: Command) -> None:
    source = tmp_path / "in"
    for shard in range(2):
        rows = {
            f"{shard:05d}{n:04d}": {
                "jpg": png(3 * shard + n),
                "txt": f"number {3 * shard + n}".encode(),
                "json": json.dumps({"caption": f"number {3 * shard + n}", "url": "x", "key": "y"}).encode(),
            }
            for n in range(3)
        }
        write_tar(source / f"{shard:05d}.tar", rows)
        (source / f"{shard:05d}_stats.json").write_text("{}")
        meta = pyarrow.table({"url": ["x"], "caption": ["y"], "key": ["z"]})
        pyarrow.parquet.write_table(meta, source / f"{shard:05d}.parquet")
    assert Stored(tmp_path, ppcl_data, source, bad=0.0).pairs == expected(6)
    with tarfile.open(source / "00000.tar") as tar:
        tar.extractall(source / "00000", filter="data")
    (source / "00000.tar").unlink()
    unpacked = Stored(tmp_path, ppcl_data, source, bad=0.0, samples_per_shard=5)
    assert unpacked.pairs == expected(6)
    assert "not read: " in unpacked.out
    assert "00000.parquet has no column of images" in unpacked.out


def test_sources_of_every_kind_together(tmp_path: Path, ppcl_data: Command) -> None:
    images(tmp_path / "folder", ["a.png"])
    write_tar(tmp_path / "tars" / "0.tar", {"x": {"png": png(1), "txt": b"number 1"}})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(hf_rows(2, 2)), tmp_path / "t.parquet")
    (tmp_path / "b.png").write_bytes(png(4))
    (tmp_path / "t.jsonl").write_text(json.dumps({"path": "b.png", "text": "number 4"}))
    write_tar(tmp_path / "far" / "1.tar", {"x": {"png": png(5), "txt": b"number 5"}})
    source = ["folder", "tars", "t.parquet", "t.jsonl"]
    stored = Stored(tmp_path, ppcl_data, [*(tmp_path / name for name in source), f"pipe:cat {tmp_path}/far/1.tar"])
    assert stored.pairs == expected(6)
