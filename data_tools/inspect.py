"""`ppcl-data inspect`: what lies in a folder of shards, in figures and on a contact sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from rich.table import Table

from data_tools.samples import (
    SOURCE,
    captions_of,
    header_of,
    image_suffix,
    latent_shape,
    read_parts,
    tensor_shapes,
)
from data_tools.sheet import write_sheet
from data_tools.summary import Summary, named
from data_tools.work import Journal, digest_of, spread
from ppcl_ds.console import Advance
from ppcl_ds.data.index import Index, scan
from ppcl_ds.errors import UserError, problem, shown

_ASPECTS = (0.5, 2 / 3, 0.9, 1 / 0.9, 1.5, 2.0)
"""Where the columns of the histogram of width over height end."""

_SHOWN = 12
"""Rows of a table of sizes at a terminal; the JSON has all."""


def inspect(folder: Path, sheet: Path | None = None, samples: int = 64, workers: int = 1) -> Summary:
    """Count what is in the shards of a folder. All bytes are read; of images and tensors, headers alone are decoded.

    Args:
        folder: shards, or a folder with `encoded/` or `raw/`, of which the encoded ones are taken first.
        sheet: a contact sheet, `.html` or `.png`.
        samples: images on it, evenly spread over all shards.
        workers: processes that read shards.

    Raises:
        UserError: there are no shards, or the sheet's name ends otherwise.
    """
    if sheet is not None and sheet.suffix.lower() not in (".html", ".png"):
        raise UserError(f"--sheet {sheet}: must end in .html or .png")
    if not any(folder.glob("*.tar")):
        folder = next((f for f in (folder / "encoded", folder / "raw") if any(f.glob("*.tar"))), folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: no shards (.tar)")
    journal = Journal(folder / ".inspect.journal", _Seen)
    seen = spread(_look, [_Job(str(path)) for path in paths], "inspecting", workers, journal)
    journal.forget()
    figures = _figures(paths, seen)
    try:
        skipped = Index.model_validate_json((folder / "index.json").read_bytes()).skipped
    except (OSError, ValueError):
        skipped = []
    figures["skipped"] = skipped
    lines = named(skipped, folder / "index.json")
    lines += named([line for shard in seen for line in shard.problems], "`ppcl-data verify`")
    if sheet is not None:
        note = write_sheet(sheet, [(path, shard.samples) for path, shard in zip(paths, seen, strict=True)], samples)
        lines.append(f"{sheet}: {note}")
        figures["sheet"] = str(sheet)
    total = sum(shard.samples for shard in seen)
    return Summary(f"{folder}: {total} samples (shards: {len(paths)})", figures, lines, _tables(figures))


@dataclass(frozen=True)
class _Job:
    path: str
    samples: int = 1

    @property
    def key(self) -> str:
        stat = Path(self.path).stat()
        return digest_of([self.path, stat.st_size, stat.st_mtime_ns])


class _Seen(BaseModel):
    """Counts of one shard, or of several together."""

    samples: int = 0
    bytes: int = 0
    images: dict[str, int] = {}
    """`640x480` -> how many."""
    modes: dict[str, int] = {}
    frames: dict[int, int] = {}
    """Of a clip; an image has one."""
    latents: dict[str, int] = {}
    """`16x128x96` -> how many."""
    characters: dict[str, dict[int, int]] = {}
    """Name of a caption -> its length in characters -> how many."""
    tokens: dict[str, dict[int, int]] = {}
    lacking: dict[str, int] = {}
    """What samples lack -> how many."""
    problems: list[str] = []


def _look(job: _Job, advance: Advance) -> _Seen:
    path = Path(job.path)
    seen = _Seen(bytes=path.stat().st_size)
    with path.open("rb") as file:
        members, problems = scan(file)
        seen.problems = [f"{path.name}:{line}" for line in problems]
        for problem in problems:
            _count(seen.lacking, problem.partition(": ")[2])
        for member in members:
            seen.samples += 1
            _look_at(seen, read_parts(file, member), f"{path.name}:{member.key}")
    advance(1)
    return seen


def _look_at(seen: _Seen, parts: Mapping[str, bytes], name: str) -> None:
    try:
        captions = captions_of(parts)
    except ValueError as fault:
        captions = {}
        _note(seen, name, str(fault))
    for caption, text in captions.items():
        _count(seen.characters.setdefault(caption, {}), len(text.strip()))
    own = image_suffix(parts)
    for suffix in filter(None, (own, image_suffix(parts, SOURCE))):
        try:
            header = header_of(parts, suffix)
        except ValueError as fault:
            _note(seen, name, str(fault))
            continue
        if suffix == own:
            _count(seen.images, f"{header.width}x{header.height}")
            _count(seen.modes, header.mode)
            _count(seen.frames, header.frames)
    if "safetensors" not in parts:
        return
    try:
        shapes = tensor_shapes(parts["safetensors"])
        _count(seen.latents, latent_shape(shapes))
    except ValueError as fault:
        _note(seen, name, str(fault))
        return
    for tensor, shape in shapes.items():
        kind, _, rest = tensor.partition(".")
        caption, _, place = rest.rpartition(".")
        if kind == "text" and place == "0" and len(shape) > 1:  # the first of what `encode_prompt` returned
            _count(seen.tokens.setdefault(caption or next(iter(captions), "caption"), {}), shape[1])


def _note(seen: _Seen, name: str, why: str) -> None:
    _count(seen.lacking, shown(why))
    seen.problems.append(problem(name, why))


def _count(counts: dict[Any, int], what: str | int) -> None:
    counts[what] = counts.get(what, 0) + 1


def _figures(paths: list[Path], seen: list[_Seen]) -> dict[str, Any]:
    splits: dict[str, dict[str, int]] = {}
    for path, shard in zip(paths, seen, strict=True):
        split = next((s for s in ("train", "heldout") if path.name.startswith(f"{s}-")), "other")
        counts = splits.setdefault(split, {"samples": 0, "shards": 0, "bytes": 0})
        counts["samples"] += shard.samples
        counts["shards"] += 1
        counts["bytes"] += shard.bytes
    sizes = _sum(shard.images for shard in seen)
    latents = _sum(shard.latents for shard in seen)
    sides = np.array([[*map(int, size.split("x")), n] for size, n in (sizes or _flat(latents)).items()]).reshape(-1, 3)
    aspects = np.digitize(sides[:, 0] / sides[:, 1], _ASPECTS)
    names = list(dict.fromkeys(name for shard in seen for name in shard.characters))
    return {
        "splits": splits,
        "shard_bytes": _spread(Counter(shard.bytes for shard in seen)),
        "images": sizes,
        "modes": _sum(shard.modes for shard in seen),
        "frames": _sum(shard.frames for shard in seen),
        "latents": latents,
        "aspects": {
            label: int(sides[aspects == column, 2].sum()) for column, label in enumerate(_aspect_labels()) if len(sides)
        },
        "captions": {
            name: {
                "count": sum(sum(shard.characters.get(name, {}).values()) for shard in seen),
                "characters": _spread(_sum(shard.characters.get(name, {}) for shard in seen)),
                "tokens": _spread(_sum(shard.tokens.get(name, {}) for shard in seen)),
            }
            for name in names
        },
        "lacking": _sum(shard.lacking for shard in seen),
        "problems": [line for shard in seen for line in shard.problems],
    }


def _sum(counts: Any) -> dict[Any, int]:
    """Counts of several shards together, the most frequent first."""
    total: Counter[Any] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items(), key=lambda item: (-item[1], str(item[0]))))


def _spread(counts: Mapping[int, int]) -> dict[str, float] | None:
    """Least, middle and largest of values that occur so many times."""
    if not counts:
        return None
    values = np.sort(np.array(list(counts)))
    ends = np.cumsum([counts[int(value)] for value in values])
    lower, upper = (
        values[np.searchsorted(ends, place, side="right")] for place in ((ends[-1] - 1) // 2, ends[-1] // 2)
    )
    return {"min": int(values[0]), "median": float(lower + upper) / 2, "max": int(values[-1])}


def _flat(latents: Mapping[str, int]) -> dict[str, int]:
    """Latent shapes C (x F) x H x W as sizes, width first."""
    flat: dict[str, int] = {}
    for shape, count in latents.items():
        *_, height, width = shape.split("x")
        flat[f"{width}x{height}"] = flat.get(f"{width}x{height}", 0) + count
    return flat


def _aspect_labels() -> list[str]:
    ends = [f"{end:.2f}" for end in _ASPECTS]
    return [f"below {ends[0]}", *(f"{a} to {b}" for a, b in pairwise(ends)), f"{ends[-1]} or more"]


def _tables(figures: dict[str, Any]) -> list[Table]:
    splits = _table("split", "samples", "shards", "MB")
    for name, counts in figures["splits"].items():
        splits.add_row(name, f"{counts['samples']:,}", f"{counts['shards']:,}", f"{counts['bytes'] / 1e6:,.1f}")
    tables = [splits]
    most = max(figures["aspects"].values(), default=0)
    for title, counts in (
        ("image (width x height)", figures["images"]),
        ("mode", figures["modes"]),
        ("frames", figures["frames"] if set(figures["frames"]) - {1} else {}),
        ("latents (C (x F) x H x W)", figures["latents"]),
        ("width / height", figures["aspects"]),
        ("lacking", figures["lacking"]),
    ):
        table = _table(title, "samples")
        for name, count in list(counts.items())[:_SHOWN]:
            bar = "█" * round(20 * count / most) if title == "width / height" and most else ""
            table.add_row(str(name), f"{count:,} {bar}" if bar else f"{count:,}")
        if len(counts) > _SHOWN:
            table.add_row(f"{len(counts) - _SHOWN} more", f"{sum(list(counts.values())[_SHOWN:]):,}")
        if counts:
            tables.append(table)
    captions = _table("caption", "samples", "characters (min, median, max)", "tokens (min, median, max)")
    for name, of in figures["captions"].items():
        captions.add_row(name, f"{of['count']:,}", *(_three(of[kind]) for kind in ("characters", "tokens")))
    return [*tables, captions]


def _three(values: Mapping[str, float] | None) -> str:
    return ", ".join(f"{value:g}" for value in values.values()) if values else "-"


def _table(first: str, *others: str) -> Table:
    table = Table(title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if first == "width / height" else "right")
    return table
