"""The sums of an array task as one safetensors file, and the files of all tasks added up again.

Neither side holds more than a range of blocks: the file's layout is known beforehand, so tensors are written as they
come, and read one by one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ppcl_ds.atomic import fsync
from ppcl_ds.data.index import digest, split_entries
from ppcl_ds.data.stream import FIXED
from ppcl_ds.errors import UserError
from ppcl_ds.probing.sums import BlockSums, Key, Lane, Sums, pieces
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.files import ModelFiles

_FIXED = (
    *(*FIXED, "probe.batch_size", "probe.batches", "probe.max_span"),
    *("distill.micro_batches_per_step", "distill.trajectories"),
)
"""Recipe keys that the sums depend on; the last two are part of which samples there are."""
_READ = 1 << 20
"""Bytes at either end of a weights file that tell it from another."""


@dataclass(frozen=True)
class Part:
    """Part `index` of `count`: micro-batches number index - 1, index - 1 + count, ... of the calibration samples."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str, batches: int) -> Part:
        """`3/8` -> part 3 of 8.

        Raises:
            UserError: it is no such thing, or there are not so many micro-batches.
        """
        found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
        part = cls(*map(int, found.groups())) if found else None
        if part is None or part.index > part.count:
            raise UserError(f"--part {text}: give its number and how many there are, such as 1/8, ..., 8/8")
        if part.count > batches:
            raise UserError(f"--part {text}: probe.batches is {batches}; use at most so many parts")
        return part

    @property
    def file(self) -> str:
        return f"part-{self.index:03d}-of-{self.count:03d}.safetensors"


def made_with(recipe: Recipe, files: ModelFiles) -> dict[str, str]:
    """All that the sums depend on, by name, as words: parts add up only where they agree."""
    dumped = json.loads(recipe.model_dump_json())
    names: dict[str, Any] = {f"{key} in the recipe": _at(dumped, key) for key in _FIXED}
    names["set of shards"] = digest(split_entries(recipe.data, "train"))
    names["teacher"] = _fingerprint(files)
    return {name: json.dumps(value, sort_keys=True) for name, value in names.items()}


def _at(node: Any, key: str) -> Any:
    for name in key.split("."):
        node = node[name]
    return node


def _fingerprint(files: ModelFiles) -> str:
    """What tells one teacher from another without reading all of it: its configuration and the ends of its files."""
    seen = hashlib.sha256(json.dumps(files.config, sort_keys=True).encode())
    for path in sorted(files.folder.glob("*.safetensors")):
        size = path.stat().st_size
        seen.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, max(0, size - _READ)):
                file.seek(start)
                seen.update(file.read(_READ))
    return seen.hexdigest()


@dataclass(frozen=True)
class Contents:
    """What a part file says about itself, beside its tensors."""

    lanes: tuple[Lane, ...]
    unused: tuple[str, ...]
    made_with: dict[str, str]


def write_part(path: Path, contents: Contents, ranges: Iterable[Sums], max_span: int) -> None:
    """Write a part file: whole or not at all.

    Args:
        ranges: sums of ranges of blocks that together are all blocks.
    """
    lanes = contents.lanes
    blocks = range(min(lane.start for lane in lanes), max(lane.stop for lane in lanes))
    header: dict[str, Any] = {"__metadata__": {"contents": json.dumps(asdict(contents))}}
    end = 0
    for lane, piece in pieces(lanes, blocks):
        for block in piece:
            for name, shape in BlockSums.shapes(lane, block, max_span).items():
                begin, end = end, end + 8 * torch.Size(shape).numel()
                key = f"{block}.{lane.stream}.{name}"
                header[key] = {"dtype": "F64", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
        for sums in ranges:
            while sums:
                (block, stream), own = sums.popitem()
                for name, tensor in own.tensors().items():
                    begin = 8 + len(encoded) + header[f"{block}.{stream}.{name}"]["data_offsets"][0]
                    # What is zero stays a hole in the file: of an even number of parts, each knows one half alone.
                    for number, row in enumerate(tensor.cpu().contiguous().unbind(0)):
                        if row.any():
                            file.seek(begin + number * row.nbytes)
                            file.write(row.numpy().data)
    fsync(partial)
    os.replace(partial, path)
    fsync(path.parent)


class Parts:
    """The part files of a folder, checked to be all there and to belong together.

    Attributes:
        contents: what they agree on.

    Raises:
        UserError: one line that says which part is missing, damaged or made otherwise.
    """

    def __init__(self, folder: Path, recipe: Recipe, files: ModelFiles) -> None:
        expected = made_with(recipe, files)
        self.paths: list[Path] = []
        found: list[Contents] = []
        for part in _all_parts(folder):
            path, again = folder / part.file, f"make it again with {_command(part)}"
            contents = _read_contents(path, again)
            for name, value in expected.items():
                if contents.made_with.get(name) != value:
                    raise UserError(f"{path}: made with another {name}; {again}")
            if found and contents != found[0]:
                raise UserError(f"{path}: has other streams than {self.paths[0].name}; {again}")
            self.paths.append(path)
            found.append(contents)
        self.contents = found[0]

    def sums(self, ranges: Sequence[range], device: torch.device) -> Iterator[Sums]:
        """Sums over all parts, range by range."""
        for blocks in ranges:
            sums: Sums = {}
            for path in self.paths:
                with safe_open(path, framework="pt") as file:
                    for lane, piece in pieces(self.contents.lanes, blocks):
                        for block in piece:
                            self._add(sums, Key(block, lane.stream), file, device)
            yield sums
            sums.clear()

    @staticmethod
    def _add(sums: Sums, key: Key, file: Any, device: torch.device) -> None:
        read = {name: file.get_tensor(f"{key.block}.{key.stream}.{name}").to(device) for name in BlockSums.NAMES}
        if key not in sums:
            sums[key] = BlockSums(read)
            return
        for name, tensor in sums[key].tensors().items():
            tensor += read[name]


def _command(part: Part) -> str:
    return f"`ppcl probe RECIPE --part {part.index}/{part.count}`"


def _all_parts(folder: Path) -> list[Part]:
    """All parts of as many as there are to be."""
    counts = sorted({int(path.stem.rpartition("-")[2]) for path in folder.glob("part-*-of-*.safetensors")})
    if not counts:
        raise UserError(f"{folder}: no parts to merge; make each with `ppcl probe RECIPE --part I/N`")
    if len(counts) > 1:
        raise UserError(f"{folder}: parts of {' and of '.join(map(str, counts))} are mixed; remove what is old")
    parts = [Part(index, counts[0]) for index in range(1, counts[0] + 1)]
    missing = [part for part in parts if not (folder / part.file).exists()]
    if missing:
        names = ", ".join(part.file for part in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{folder}: {names} missing ({len(missing)} of {len(parts)}); make it with {_command(missing[0])}"
        )
    return parts


def _read_contents(path: Path, again: str) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            raw = json.loads(file.metadata()["contents"])
        return Contents(tuple(Lane(**lane) for lane in raw["lanes"]), tuple(raw["unused"]), raw["made_with"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as fault:
        raise UserError(f"{path}: damaged ({fault}); {again}") from None
