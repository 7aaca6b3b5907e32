"""Every layout is read back by a reader written from what the benchmark's own scorer does, and counted.

Image k of prompt n is one colour, of both numbers, so that a reader can tell which image it has found.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.layouts import LAYOUTS, Laid, lay_out, read_set
from ppcl_ds.prompt_sets import PromptSet

SIZE = 8
MODEL = "small-finetuned"
TEXTS = ["a red cat", "un café «vrai», très grand", "three, two, one", "一只红色的猫", "a dog.", 'the sign says "OPEN"']

Colour = tuple[int, int]
"""Of an image: which prompt, which of its images."""


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def prompts_of(layout: str, folder: Path) -> Path:
    """The benchmark's own kind of file."""
    if layout == "geneval":
        rows = [{"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": text} for text in TEXTS]
        return jsonl(folder / "evaluation_metadata.jsonl", rows)
    if layout == "geneval2":
        return jsonl(
            folder / "geneval2_data.jsonl", [{"prompt": text, "atom_count": 1, "vqa_list": []} for text in TEXTS]
        )
    if layout == "longtext":  # its numbers have gaps
        numbered = [{"prompt_id": 40 * n, "prompt": text, "text": ["OPEN"]} for n, text in enumerate(TEXTS)]
        return jsonl(folder / "text_prompts.jsonl", numbered)
    if layout == "dpg":
        (folder / "prompts").mkdir()
        for name, text in zip(
            ["0", "COCOval2014_7", "diffusiondb12", "partiprompts3", "x9", "y10"], TEXTS, strict=True
        ):
            (folder / "prompts" / f"{name}.txt").write_text(text)
        return folder / "prompts"
    if layout == "oneig":
        path = folder / "OneIG-Bench.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["category", "id", "prompt_en", "type", "prompt_length", "class"])
            categories = ["Anime_Stylization", "Anime_Stylization", "Portrait", "General_Object", "Text_Rendering"]
            ids = ["000", "001", "000", "000", "000", "000"]
            for category, name, text in zip([*categories, "Knowledge_Reasoning"], ids, TEXTS, strict=True):
                writer.writerow([category, name, text, "NP", "short", ""])
        return path
    if layout == "hpsv2":
        (folder / "benchmark").mkdir()
        for style, texts in (("anime", TEXTS[:2]), ("photo", TEXTS[2:])):
            (folder / "benchmark" / f"{style}.json").write_text(json.dumps(texts))
        (folder / "benchmark" / "drawbench.json").write_text("[]")
        return folder / "benchmark"
    (folder / "color_val.txt").write_text("\n".join(TEXTS) + "\n")
    return folder / "color_val.txt"


def laid_out(layout: str, folder: Path, per_prompt: int = 0) -> tuple[Laid, Path]:
    """A set of images that are there, as a scorer finds them."""
    settings = PromptSet(name="set", prompts=prompts_of(layout, folder), layout=layout, per_prompt=per_prompt)  # type: ignore[arg-type]
    laid = read_set(settings, folder)
    write(laid)
    return laid, laid.root / "images"


def write(laid: Laid) -> None:
    lay_out(laid, MODEL, lambda n, k: picture(laid.root / "drawn", n, k), {"size": [SIZE, SIZE]})


def picture(folder: Path, n: int, k: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{n}-{k}.png"
    if not path.exists():
        Image.new("RGB", (SIZE, SIZE), (40 * n, 20 * k, 90)).save(path)
    return path


def colour(image: Image.Image) -> Colour | None:
    """Which image it is; None: it is black. JPEG and WebP are a little off, and at edges more."""
    if not any(image.convert("RGB").tobytes()):
        return None
    red, green, _ = image.convert("RGB").getpixel((image.width // 2, image.height // 2))  # type: ignore[misc]
    return round(red / 40), round(green / 20)


def geneval(images: Path, prompts: Path) -> dict[str, list[Colour | None]]:
    found = {}
    for subfolder in os.listdir(images / MODEL):
        assert subfolder.isdigit()
        metadata = json.load((images / MODEL / subfolder / "metadata.jsonl").open())
        assert metadata in [json.loads(line) for line in prompts.read_text().splitlines()]
        names = sorted(os.listdir(images / MODEL / subfolder / "samples"))
        assert all(re.match(r"\d+\.png", name) for name in names)
        found[metadata["prompt"]] = [colour(Image.open(images / MODEL / subfolder / "samples" / n)) for n in names]
    return found


def dpg(images: Path, prompts: Path) -> dict[str, list[Colour | None]]:
    found = {}
    for name in os.listdir(images / MODEL):  # all of them: the scorer opens whatever is there
        key = name.split(".")[0]
        grid, s = Image.open(images / MODEL / name), SIZE
        boxes = [(0, 0, s, s), (s, 0, 2 * s, s), (0, s, s, 2 * s), (s, s, 2 * s, 2 * s)]
        found[(prompts / f"{key}.txt").read_text()] = [colour(grid.crop(box)) for box in boxes]
    return found


def longtext(images: Path, prompts: Path) -> dict[str, list[Colour | None]]:
    known = {p["prompt_id"]: p["prompt"] for p in map(json.loads, prompts.read_text().splitlines())}
    found: dict[str, list[Colour | None]] = {}
    for path in sorted(glob.glob(f"{images / MODEL}/*.png")):
        assert re.fullmatch(r"\d{4}_[1-4]\.png", Path(path).name)
        found.setdefault(known[int(Path(path).name.split("_")[0])], []).append(colour(Image.open(path)))
    return found


def oneig(images: Path, prompts: Path) -> dict[str, list[Colour | None]]:
    folders = {"Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object"}
    folders |= {"Text_Rendering": "text", "Knowledge_Reasoning": "reasoning"}
    found = {}
    assert sorted(os.listdir(images)) == sorted(folders.values())
    for row in csv.DictReader(prompts.open(newline="")):
        [path] = glob.glob(f"{images}/{folders[row['category']]}/{MODEL}/{row['id']}*")
        assert path.endswith(".webp")
        grid = Image.open(path)
        width, height = grid.width // 2, grid.height // 2
        boxes = [(j * width, i * height, (j + 1) * width, (i + 1) * height) for i in (0, 1) for j in (0, 1)]
        found[row["prompt_en"]] = [colour(grid.crop(box)) for box in boxes]
    return found


def compbench(images: Path, prompts: Path) -> dict[str, list[Colour | None]]:
    names = os.listdir(images / MODEL / "samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [int(name.split("_")[-1].split(".")[0]) for name in names] == list(range(len(names)))
    found: dict[str, list[Colour | None]] = {}
    for name in names:
        found.setdefault(name.split("_")[0], []).append(colour(Image.open(images / MODEL / "samples" / name)))
    return found


def hpsv2(images: Path, prompts: Path) -> dict[str, list[Colour | None]]:
    found = {}
    for style in os.listdir(images / MODEL):  # all of them: each must have a list
        for index, text in enumerate(json.loads((prompts / f"{style}.json").read_text())):
            found[text] = [colour(Image.open(images / MODEL / style / f"{index:05d}.jpg"))]
    return found


def geneval2(images: Path, prompts: Path) -> dict[str, list[Colour | None]]:
    mapped = json.load((images / f"{MODEL}.json").open())
    rows = [json.loads(line) for line in prompts.open()]
    return {row["prompt"]: [colour(Image.open(mapped[row["prompt"]]))] for row in rows}


def plain(images: Path, prompts: Path) -> dict[str, list[Colour | None]]:
    found: dict[str, list[Colour | None]] = {}
    for path in sorted((images / MODEL).iterdir()):
        line = prompts.read_text().splitlines()[int(path.name.split("_")[0])]
        found.setdefault(line, []).append(colour(Image.open(path)))
    return found


READERS: dict[str, tuple[Callable[[Path, Path], dict[str, list[Colour | None]]], int]] = {
    "folder": (plain, 1),
    "geneval": (geneval, 4),
    "dpg": (dpg, 4),
    "longtext": (longtext, 4),
    "oneig": (oneig, 4),
    "compbench": (compbench, 10),
    "hpsv2": (hpsv2, 1),
    "geneval2": (geneval2, 1),
}
"""Layout -> reader, and images of each prompt."""


def test_every_layout_has_a_reader() -> None:
    assert READERS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("layout", READERS)
def test_the_scorer_finds_every_image_of_every_prompt(layout: str, tmp_path: Path) -> None:
    reader, count = READERS[layout]
    laid, images = laid_out(layout, tmp_path)
    expected = {text: [(n, k) for k in range(count)] for n, text in enumerate(TEXTS)}
    if layout == "dpg":  # whose files' order is not that of the lines above
        expected = {prompt.text: [(n, k) for k in range(4)] for n, prompt in enumerate(laid.prompts)}
    assert reader(images, laid.settings.prompts) == expected


@pytest.mark.parametrize("layout", ["dpg", "oneig"])
def test_where_images_are_missing_a_grid_is_black(layout: str, tmp_path: Path) -> None:
    laid, images = laid_out(layout, tmp_path, per_prompt=3)
    cells = READERS[layout][0](images, laid.settings.prompts)
    assert [row[3] for row in cells.values()] == [None] * len(TEXTS)
    assert all(None not in row[:3] for row in cells.values())


def test_what_the_scorer_wrote_stays_and_what_is_old_goes(tmp_path: Path) -> None:
    laid, images = laid_out("compbench", tmp_path, per_prompt=2)
    (images / MODEL / "annotation_blip").mkdir()
    (images / MODEL / "annotation_blip" / "vqa_result.json").write_text("[]")
    fewer = Laid(laid.settings.model_copy(update={"per_prompt": 1}), laid.prompts, laid.root)
    write(fewer)
    assert compbench(images, laid.settings.prompts) == {text: [(n, 0)] for n, text in enumerate(TEXTS)}
    assert (images / MODEL / "annotation_blip" / "vqa_result.json").exists()
    settings = json.loads((laid.root / f"{MODEL}.json").read_text())
    assert settings["size"] == [SIZE, SIZE]
    assert len(settings["images"]) == len(TEXTS)


def test_a_layout_that_is_complete_is_not_written_again(tmp_path: Path) -> None:
    laid, images = laid_out("dpg", tmp_path)
    grid = next((images / MODEL).iterdir())
    before = grid.stat().st_mtime_ns
    write(laid)
    assert grid.stat().st_mtime_ns == before
    grid.unlink()
    write(laid)
    assert grid.exists()


BAD: list[tuple[str, str | bytes, str]] = [
    ("folder", "a cat\n\na dog\n", "line 2 is blank"),
    ("folder", "a cat\na dog\na cat\n", "line 3 repeats .*line 1: 'a cat'"),
    ("folder", "a cat\n" + "x" * 10_000 + "\n", "line 2 has 10,000 characters"),
    ("folder", "", "no prompt in it"),
    ("folder", "caf\xe9\n".encode("latin-1"), "byte 3 is not UTF-8"),
    ("folder", "a cat".encode("utf-16"), "byte 0 is not UTF-8"),
    ("folder", "a\0cat\n", "NUL character"),
    ("geneval", '{"prompt": "a cat"}\n\n{"prompt": "a dog"}\n', "line 2 is blank"),
    ("geneval", '{"prompt": "a cat"\n', "line 1: no JSON"),
    ("geneval", '{"text": "a cat"}\n', "line 1: no text under 'prompt'"),
    ("longtext", '{"prompt": "a cat"}\n', "no 'prompt_id'"),
    ("longtext", '{"prompt": "a", "prompt_id": 3}\n{"prompt": "b", "prompt_id": 3}\n', "line 2 has the id '3' of"),
    ("longtext", '{"prompt": "a cat", "prompt_id": "x"}\n', "'prompt_id' is no whole number"),
    ("geneval2", '{"prompt": "a cat"}\n{"prompt": "a cat"}\n', "line 2 repeats"),
    ("compbench", "a cat and/or a dog\n", "line 1: compbench makes a file's name of the prompt, which holds '/'"),
    ("compbench", "a_cat\n", "which holds '_'"),
    ("compbench", "猫" * 90 + "\n", "too long for that"),
    ("oneig", "id,prompt\n1,a cat\n", "no columns category"),
    ("oneig", "category,id,prompt_en\nCats,000,a cat\n", "line 2: no category 'Cats'"),
    ("oneig", "category,id,prompt_en\nPortrait,../x,a cat\n", "the id '../x' cannot be a file's name"),
]


@pytest.mark.parametrize(("layout", "content", "words"), BAD)
def test_a_bad_file_of_prompts_is_one_line(layout: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=words) as fault:
        read_set(PromptSet(name="set", prompts=path, layout=layout), tmp_path)  # type: ignore[arg-type]
    assert str(fault.value).startswith(str(path))
    assert "\n" not in str(fault.value)


def test_missing_files_and_wrong_folders_are_one_line(tmp_path: Path) -> None:
    for layout in READERS:
        with pytest.raises(UserError, match="no such file or folder"):
            read_set(PromptSet(name="set", prompts=tmp_path / "nowhere", layout=layout), tmp_path)  # type: ignore[arg-type]
    (tmp_path / "a.b.txt").write_text("a cat")
    with pytest.raises(UserError, match="a dot in its name"):
        read_set(PromptSet(name="set", prompts=tmp_path, layout="dpg"), tmp_path)
    with pytest.raises(UserError, match="none of anime"):
        read_set(PromptSet(name="set", prompts=tmp_path, layout="hpsv2"), tmp_path)
    with pytest.raises(UserError, match="reads at most 4"):
        read_set(PromptSet(name="set", prompts=tmp_path, layout="dpg", per_prompt=5), tmp_path)


def test_a_byte_order_mark_and_windows_lines_are_no_part_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\r\na\xe2\x80\xa8dog\r\n")
    laid = read_set(PromptSet(name="set", prompts=path), tmp_path)
    assert [prompt.text for prompt in laid.prompts] == ["a cat", "a\u2028dog"]
