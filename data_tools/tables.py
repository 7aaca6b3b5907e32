"""Tables as sources: rows of JSON lines, CSV and parquet, and the images that parquet files hold themselves."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_tools.samples import caption_parts, captions_in, is_caption, kind_of, write_tar
from ppcl_ds.console import Advance
from ppcl_ds.data.images import open_header
from ppcl_ds.data.index import SUFFIXES
from ppcl_ds.errors import UserError, brief, problem, shown

TABLES = (".jsonl", ".csv", ".parquet")
IMAGE_COLUMNS = (
    *(
        "path",
        "image",
        "video",
        "img",
        "file_name",
        "filename",
        "file",
        "file_path",
        "filepath",
        "image_path",
        "video_path",
    ),
    *("bytes", "jpg", "png", "webp"),
)
"""The first of these that a table has says where the image is, or, in parquet, holds it."""

_LONGEST_ROW = 1000
"""Lines of a CSV after which a quote is taken for one that never closes."""

_BATCH = 64
"""Rows of a parquet file that are in memory at a time."""


class Row(dict[str, Any]):
    """Values by column."""


def rows_of(table: Path, columns: Sequence[str], alone: bool = False) -> tuple[str, Iterator[tuple[int, Row | str]]]:
    """The rows of a table, each with its number, or what is wrong with it.

    Args:
        table: a file whose name ends as one of `TABLES`.
        columns: `data.caption_columns`.
        alone: whether captions can be used alone.

    Returns:
        The column of the image's path, empty where there is none, and the rows.

    Raises:
        UserError: it is no such file, or has no column of images or captions.
    """
    if table.suffix.lower() == ".parquet":
        with _parquet(table) as file:
            known = _needed(table, _names(file), columns, alone)
        return known[0], _parquet_rows(table, list(filter(None, known)))
    rows = list({".jsonl": _jsonl, ".csv": _csv}[table.suffix.lower()](table))
    names = list(dict.fromkeys(name for _, row in rows if isinstance(row, Row) for name in row))
    image = _needed(table, names, columns, alone)[0] if names else ""
    return image, iter(rows)


def holds_images(table: Path, columns: Sequence[str], alone: bool = False) -> bool:
    """Whether a table holds the images themselves: a parquet file with a column of bytes, alone or in a struct."""
    if table.suffix.lower() != ".parquet":
        return False
    with _parquet(table) as file:
        image = _needed(table, _names(file), columns, alone)[0]
        return bool(image) and _of_bytes(file.schema_arrow.field(image).type)


@dataclass(frozen=True)
class Unpacking:
    """A parquet file with images in it, and the tar for its samples."""

    table: str
    tar: str
    columns: tuple[str, ...]
    stamp: tuple[int, int]
    samples: int = 1

    @property
    def key(self) -> str:
        return repr((self.table, self.columns, self.stamp))


class Unpacked(BaseModel):
    """What became of a parquet file: rows that cannot be used."""

    tar: str
    problems: list[str]


def unpack(job: Unpacking, advance: Advance) -> Unpacked:
    """Write the samples of a parquet file to a tar, a few rows in memory at a time; keys are row numbers."""
    table, problems = Path(job.table), []
    image, rows = rows_of(table, job.columns)

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number, row in rows:
            assert isinstance(row, Row)
            try:
                parts = _image(row[image], table.parent) | caption_parts(captions_in(row, job.columns))
            except (OSError, ValueError) as fault:
                problems.append(problem(f"{table}:{number}", fault))
            else:
                yield f"{number:08d}", parts

    write_tar(Path(job.tar), samples())
    advance(1)
    return Unpacked(tar=job.tar, problems=problems)


def _image(value: Any, folder: Path) -> dict[str, bytes]:
    """An image's bytes by their suffix."""
    path = value.get("path") if isinstance(value, dict) else None
    value = value.get("bytes") if isinstance(value, dict) else value
    if value is None and isinstance(path, str) and path and "\0" not in path:
        value = (folder / path).read_bytes()
    if not isinstance(value, bytes):
        raise ValueError(f"the image is {kind_of(value)}")
    try:
        kind = str(open_header(value).format)
    except ValueError as fault:
        raise ValueError(f"the image {fault}") from None
    return {{"JPEG": "jpg", "MPO": "jpg", "HEIF": "heic"}.get(kind, kind.lower()): value}


def _needed(table: Path, names: Sequence[str], columns: Sequence[str], alone: bool = False) -> list[str]:
    """Of a table's columns the image's, which comes first and is empty for captions alone, and the captions'."""
    image = next((name for name in IMAGE_COLUMNS if name in names), "")
    captions = [name for name in columns if name in names] if columns else list(filter(is_caption, names))
    if (image or alone) and captions and len(captions) >= len(columns):
        return [image, *captions]
    known = ", ".join(columns) or "caption, text, prompt, each also with a language: caption_en"
    captioned = f"captions ({known}; `data.caption_columns` names others)"
    needed = captioned if image or alone else f"images ({', '.join(IMAGE_COLUMNS)})"
    raise UserError(f"{table} has no column of {needed}; its columns: {shown(', '.join(map(str, names)), 600)}")


def _jsonl(table: Path) -> Iterator[tuple[int, Row | str]]:
    with table.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError):
                row = None
            yield number, Row(row) if isinstance(row, dict) else "not a JSON object in UTF-8"


def _csv(table: Path) -> Iterator[tuple[int, Row | str]]:
    """Rows by the number of their first line.

    A quote that opens a field and does not close, or closes rows later, costs its own line alone: a row of several
    lines, one of which is a whole row by itself, is not taken for a caption of several lines.
    """
    csv.field_size_limit(sys.maxsize)  # captions may be longer than the usual limit
    # What is not UTF-8 becomes lone surrogates, by which a caption is found and a path works as it is.
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = file.readlines()
    header: list[str] = []
    start = 0
    while start < len(lines):
        ahead = csv.reader((lines[n] for n in range(start, min(start + _LONGEST_ROW, len(lines)))), strict=True)
        number = start + 1
        try:
            fields = next(ahead, [])
            end = start + max(ahead.line_num, 1)
            if header and any(_is_row(line, header) for line in lines[start + 1 : end]):
                raise csv.Error("the quote in it closes in another row")
        except csv.Error as fault:
            yield number, f'{brief(fault)}; a caption with quotes, commas or several lines is written "so ""quoted"""'
            start += 1
            continue
        start = end
        if not header:
            header = fields
        elif len(fields) > len(header):
            yield number, f"{len(fields)} fields, the first line has {len(header)}; a caption with a comma needs quotes"
        elif fields:
            yield number, Row(dict.fromkeys(header) | dict(zip(header, fields, strict=False)))


def _is_row(line: str, header: Sequence[str]) -> bool:
    place = next((header.index(name) for name in IMAGE_COLUMNS if name in header), None)
    fields = next(csv.reader([line]), [])
    if place is None or len(fields) != len(header):
        return False
    return os.path.splitext(fields[place])[1].lower().lstrip(".") in SUFFIXES


def _parquet(table: Path) -> Any:
    import pyarrow.parquet  # takes a while

    try:
        return pyarrow.parquet.ParquetFile(table)
    except (pyarrow.ArrowException, OSError) as fault:
        raise UserError(f"{table} is no parquet file ({brief(fault)})") from None


def _names(file: Any) -> list[str]:
    """Columns of a parquet file; where one holds images, those that might be their paths are left out."""
    fields = {field.name: _of_bytes(field.type) for field in file.schema_arrow}
    held = any(of_bytes for name, of_bytes in fields.items() if name in IMAGE_COLUMNS)
    return [name for name, of_bytes in fields.items() if of_bytes or name not in IMAGE_COLUMNS or not held]


def _of_bytes(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _parquet_rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[int, Row | str]]:
    import pyarrow

    number = 0
    with _parquet(table) as file:
        try:
            for batch in file.iter_batches(_BATCH, columns=list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, Row(row)
        except (pyarrow.ArrowException, OSError) as fault:
            raise UserError(f"{table} is damaged behind row {number} ({brief(fault)})") from None
