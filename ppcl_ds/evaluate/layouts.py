"""How each benchmark's scorer wants images to lie: one table of templates, one writer.

In RUN/evaluate/SET/: `drawn/MODEL/` has every image once, by what it depends on; `images/` has them as the scorer reads
them; `MODEL.json` says how they were drawn.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ppcl_ds.atomic import atomic_write
from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.prompts import Prompt, Reader, check, json_lines, lines, styles, table, text_files
from ppcl_ds.prompt_sets import PromptSet


@dataclass(frozen=True)
class Layout:
    """One benchmark's.

    Attributes:
        read: its file of prompts.
        path: of an image below `images/`, filled in with `model`, and of the prompt `number`, `id`, `text`, `folder`;
            `k` counts its images from 0, `place` all images of the set.
        per_prompt: images that the scorer expects; the most, where it reads no more.
        grid: all of a prompt are one image of 2 x 2, black where there are fewer.
        entry: where the prompt's line of the file goes, likewise.
        map: whether `images/MODEL.json` says which prompt has which file.
        unique: whether nothing but their text tells prompts apart.
        in_name: whether the prompt is part of a file's name.
    """

    read: Reader
    path: str
    per_prompt: int
    most: int = 100
    grid: bool = False
    entry: str = ""
    map: bool = False
    unique: bool = False
    in_name: bool = False


LAYOUTS: Mapping[str, Layout] = {
    "folder": Layout(lines, "{model}/{id}_{k:02d}.png", 1, unique=True),
    "geneval": Layout(
        json_lines, "{model}/{number:05d}/samples/{k:04d}.png", 4, entry="{model}/{number:05d}/metadata.jsonl"
    ),
    "dpg": Layout(text_files, "{model}/{id}.png", 4, most=4, grid=True),
    "longtext": Layout(partial(json_lines, key="prompt_id"), "{model}/{id:>04}_{k1}.png", 4),
    "oneig": Layout(table, "{folder}/{model}/{id}.webp", 4, most=4, grid=True),
    "compbench": Layout(lines, "{model}/samples/{text}_{place:06d}.png", 10, in_name=True),
    "hpsv2": Layout(styles, "{model}/{folder}/{id}.jpg", 1, most=1),
    "geneval2": Layout(json_lines, "{model}/{number:05d}.png", 1, most=1, map=True, unique=True),
}
"""Sources: djghosh13/geneval `evaluate_images.py`; TencentQQGYLab/ELLA `compute_dpg_bench.py`; X-Omni-Team/X-Omni
`evaluate_text_reward.py`; OneIG-Bench `text2image.py`; Karine-Huang/T2I-CompBench `inference_eval.py`; tgxs002/HPSv2
`evaluation.py`; facebookresearch/GenEval2 `evaluation.py`."""

_CELLS = 4
"""Of a grid."""
_NAME_BYTES = 255 - len(".partial")
"""Of a file's name, on nearly every file system."""


@dataclass(frozen=True)
class Laid:
    """A prompt set, read and checked.

    Attributes:
        root: its folder.
        per_prompt: images of each prompt.
    """

    settings: PromptSet
    prompts: Sequence[Prompt]
    root: Path

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.settings.layout]

    @property
    def per_prompt(self) -> int:
        return self.settings.per_prompt or self.layout.per_prompt

    def settings_file(self, model: str) -> Path:
        return self.root / f"{model}.json"


def read_set(settings: PromptSet, run: Path) -> Laid:
    """Read a set's prompts.

    Raises:
        UserError: there are none, or some cannot be drawn or laid out; or the scorer reads fewer images of each.
    """
    layout = LAYOUTS[settings.layout]
    if settings.per_prompt > layout.most:
        raise UserError(
            f"evaluate.sets: '{settings.name}' draws {settings.per_prompt} images of each prompt, but the scorer of "
            f"{settings.layout} reads at most {layout.most}"
        )
    prompts = layout.read(settings.prompts)
    check(prompts, settings.prompts, layout.unique)
    for prompt in prompts if layout.in_name else ():
        name = f"{prompt.text}_000000.png"
        bad = next((sign for sign in "/_" if sign in prompt.text), None)
        if bad or len(name.encode()) > _NAME_BYTES:
            why = f"holds '{bad}'" if bad else "is too long for that"
            raise UserError(f"{prompt.place}: {settings.layout} makes a file's name of the prompt, which {why}")
    return Laid(settings, prompts, run / "evaluate" / settings.name)


def lay_out(laid: Laid, model: str, drawn: Callable[[int, int], Path], facts: Mapping[str, Any]) -> None:
    """Write the images of one model as the scorer reads them, and beside them how they were drawn.

    What the scorer has written among them stays; images that an earlier writing left and this one does not go.

    Args:
        drawn: where image k of the prompt at a position is.
        facts: for `MODEL.json`.

    Raises:
        OSError: something cannot be written.
    """
    layout, images = laid.layout, laid.root / "images"
    files: dict[str, list[Path]] = {}
    mapped: dict[str, str] = {}
    for position, prompt in enumerate(laid.prompts):
        cells = [drawn(position, k) for k in range(laid.per_prompt)]
        for k, cell in enumerate(cells):
            name = _name(layout.path, laid, model, prompt, k, position * laid.per_prompt + k)
            files.setdefault(name, []).append(cell)
            mapped[prompt.text] = str((images / name).resolve())
    digest = [[name, *(cell.name for cell in cells)] for name, cells in files.items()]
    before = _written(laid.settings_file(model))
    if before.get("images") != digest or not all((images / name).exists() for name in files):
        laid.settings_file(model).unlink(missing_ok=True)  # until all are there
        for name in {old[0] for old in before.get("images", [])} - files.keys():
            (images / name).unlink(missing_ok=True)
        for name, cells in files.items():
            _write(images / name, cells, layout.grid)
    for prompt in laid.prompts if layout.entry else ():
        line = json.dumps(prompt.entry, ensure_ascii=False)
        atomic_write(images / _name(layout.entry, laid, model, prompt), line + "\n")
    if layout.map:
        atomic_write(images / f"{model}.json", json.dumps(mapped, indent=1, ensure_ascii=False) + "\n")
    written = json.dumps({**facts, "images": digest}, indent=1, ensure_ascii=False)
    atomic_write(laid.settings_file(model), written + "\n")


def _name(template: str, laid: Laid, model: str, prompt: Prompt, k: int = 0, place: int = 0) -> str:
    return template.format(
        model=model,
        number=prompt.number,
        id=prompt.id,
        text=prompt.text,
        folder=prompt.folder,
        k=k,
        k1=k + 1,
        place=place,
    )


def _written(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text()))
    return {}


def _write(path: Path, cells: Sequence[Path], grid: bool) -> None:
    """One file of the scorer's: an image as it was drawn, in another format, or a grid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not grid and path.suffix == ".png":
        path.unlink(missing_ok=True)
        try:
            os.link(cells[0], path)
        except OSError:  # a disk without hard links
            atomic_write(path, cells[0].read_bytes())
        return
    images = [Image.open(cell).convert("RGB") for cell in cells]
    image = as_grid(images) if grid else images[0]
    buffer = io.BytesIO()
    # OneIG-Bench leaves out cells that are black in every pixel, which lossy compression would not keep so.
    options: dict[str, dict[str, Any]] = {".jpg": {"quality": 95}, ".webp": {"lossless": len(cells) < _CELLS}}
    image.save(buffer, Image.registered_extensions()[path.suffix], **options.get(path.suffix, {}))
    atomic_write(path, buffer.getvalue())


def as_grid(images: Sequence[Image.Image]) -> Image.Image:
    """Up to four images of one size as 2 x 2: top left, top right, bottom left, bottom right; the rest is black."""
    width, height = images[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, image in enumerate(images):
        grid.paste(image, (number % 2 * width, number // 2 * height))
    return grid
