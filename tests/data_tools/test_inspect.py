"""Promises of `ppcl-data inspect`: its figures are those of the samples, its sheets can be looked at."""

from __future__ import annotations

import base64
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data_tools.conftest import Command, png, tree, write_recipe, write_tar

SIZES = [(8, 8), (16, 8), (8, 16), (9, 8), (30, 10)]


@pytest.fixture
def project(tmp_path: Path, ppcl_data: Command) -> Path:
    """53 samples of known sizes and captions, sharded and encoded."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(53):
        width, height = SIZES[number % len(SIZES)]
        image = Image.new("L" if number % 4 == 0 else "RGB", (width, height), number)
        image.save(images / f"{number}.png")
        captions = {"caption": "word " * (number % 7 + 1)} | ({"caption_de": "ein Wort <b>"} if number % 3 else {})
        (images / f"{number}.json").write_text(json.dumps(captions))
    write_recipe(tmp_path, images={"size": 8, "max_aspect": 2.0})
    ppcl_data("shard", tmp_path)
    ppcl_data("encode", tmp_path)
    return tmp_path


def figures(ppcl_data: Command, folder: Path, *more: str | Path) -> dict[str, Any]:
    code, out, err = ppcl_data.run("inspect", folder, "--json", "-", *more)
    assert code == 0, err
    return dict(json.loads(out))


def three(values: list[int]) -> dict[str, float]:
    return {"min": np.min(values), "median": np.median(values), "max": np.max(values)}


def test_figures_of_raw_shards_are_those_of_the_images(project: Path, ppcl_data: Command) -> None:
    raw = project / "shards" / "raw"
    before = tree(raw)
    got = figures(ppcl_data, raw)
    assert tree(raw) == before
    assert got["splits"]["train"]["samples"] + got["splits"]["heldout"]["samples"] == 53
    assert got["splits"]["train"]["bytes"] == sum(path.stat().st_size for path in raw.glob("train-*.tar"))
    assert got["shard_bytes"] == three([path.stat().st_size for path in raw.glob("*.tar")])
    sizes = [SIZES[number % len(SIZES)] for number in range(53)]
    assert got["images"] == {f"{w}x{h}": sizes.count((w, h)) for w, h in SIZES}
    assert got["modes"] == {"RGB": 39, "L": 14}
    ratios = [w / h for w, h in sizes]
    edges = [0, 0.5, 2 / 3, 0.9, 1 / 0.9, 1.5, 2, np.inf]
    assert list(got["aspects"].values()) == [sum(a <= r < b for r in ratios) for a, b in pairwise(edges)]
    lengths = [len(("word " * (number % 7 + 1)).strip()) for number in range(53)]
    assert got["captions"]["caption"] == {"count": 53, "characters": three(lengths), "tokens": None}
    assert got["captions"]["caption_de"]["count"] == 35
    assert got["lacking"] == {}
    assert figures(ppcl_data, raw, "--workers", "3") == got


def test_figures_of_encoded_shards_are_those_of_their_tensors(project: Path, ppcl_data: Command) -> None:
    got = figures(ppcl_data, project / "shards")
    assert got == figures(ppcl_data, project / "shards" / "encoded")
    assert sum(got["latents"].values()) == 53
    assert len(got["latents"]) > 2
    assert got["captions"]["caption"]["tokens"] == three([number % 7 + 1 for number in range(53)])
    assert got["captions"]["caption_de"]["tokens"] == {"min": 3, "median": 3, "max": 3}
    assert got["images"] == {}


def test_a_person_sees_tables(project: Path, ppcl_data: Command) -> None:
    out = ppcl_data("inspect", project / "shards" / "raw")
    for word in ("heldout", "30x10", "RGB", "caption_de", "0.90 to 1.11", "█"):
        assert word in out


def test_what_samples_lack_is_counted(tmp_path: Path, ppcl_data: Command) -> None:
    samples = {
        "a": {"png": png(), "txt": b"a"},
        "b": {"png": png()},
        "c": {"txt": b"c"},
        "d": {"png": png(), "txt": b" "},
    }
    write_tar(tmp_path / "s" / "other.tar", samples)
    got = figures(ppcl_data, tmp_path / "s")
    assert got["lacking"]["no caption (.txt or .json)"] == 1
    assert got["lacking"]["its caption is empty"] == 1
    assert sum(got["lacking"].values()) == 3
    assert got["splits"] == {
        "other": {"samples": 2, "shards": 1, "bytes": (tmp_path / "s" / "other.tar").stat().st_size}
    }
    (tmp_path / "void").mkdir()
    assert "no shards" in ppcl_data.fail("inspect", tmp_path / "void")


def test_the_html_sheet_shows_samples_from_all_over(project: Path, ppcl_data: Command) -> None:
    sheet = project / "sheet.html"
    ppcl_data("inspect", project / "shards" / "raw", "--sheet", sheet, "--samples", "20")
    page = sheet.read_text()
    thumbnails = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)\"", page)]
    assert len(thumbnails) == 20
    for image in thumbnails:
        image.load()
    assert "ein Wort &lt;b&gt;" in page
    assert "<b>\n" not in page
    assert "http" not in page, "nothing is fetched"
    shards = set(re.findall(r"(\w+-\d{6}\.tar):", page))
    assert shards == {path.name for path in (project / "shards" / "raw").glob("*.tar")}


def test_the_png_sheet_shows_latents_where_there_are_no_images(project: Path, ppcl_data: Command) -> None:
    sheet = project / "sheet.png"
    out = ppcl_data("inspect", project / "shards", "--sheet", sheet, "--samples", "9")
    assert "9 of them are latents: their first three channels" in out
    image = Image.open(sheet)
    image.load()
    assert image.width == 8 * 176
    assert image.height == 2 * 250
    assert "must end in .html or .png" in ppcl_data.fail("inspect", project / "shards", "--sheet", project / "s.pdf")
    ppcl_data("inspect", project / "shards", "--sheet", sheet)
    assert Image.open(sheet).height == 7 * 250, "all 53, where more were asked for"
