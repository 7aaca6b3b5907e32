"""The names of tensors in single files, both ways, by the table in `names.yaml`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.files import Source, Sources

FILE = Path(__file__).with_name("names.yaml")
PREFIX = "model.diffusion_model."
"""Stands before every name in files that hold more than the transformer."""


@dataclass(frozen=True)
class Place:
    """A tensor of a single file.

    Attributes:
        origins: names of diffusers' tensors that lie in it, one under the other.
        swapped: its halves are in the other order.
        flat: it has one dimension.
    """

    name: str
    origins: tuple[str, ...]
    swapped: bool = False
    flat: bool = False


@dataclass(frozen=True)
class Names:
    """How a family's tensors are called in single files; `names.yaml` says what each field means."""

    arch: str = ""
    names: Mapping[str, str | list[str]] = field(default_factory=dict)
    swapped: Sequence[str] = ()
    flat: Sequence[str] = ()
    marks: Mapping[str, str] = field(default_factory=dict)
    taken: Mapping[str, Mapping[str, list[int] | str | Mapping[str, list[int]]]] = field(default_factory=dict)
    lack: Sequence[str] = ()

    def places(self, ours: Iterable[str]) -> list[Place]:
        """The tensors of the file that holds these of diffusers' tensors.

        Raises:
            UserError: the table has no place for one of them, or only for a part of what lies together.
        """
        found: dict[str, dict[int, str]] = {}
        whole: dict[str, int] = {}
        for name in ours:
            theirs, row, rows = self._place(name)
            found.setdefault(theirs, {})[row] = name
            whole[theirs] = rows
        for theirs, parts in found.items():
            if len(parts) != whole[theirs]:
                raise UserError(f"'{theirs}' would lack a part; there is only {', '.join(parts.values())}")
        swapped, flat = (set(_matching(patterns, found)) for patterns in (self.swapped, self.flat))
        return [
            Place(theirs, tuple(parts[row] for row in sorted(parts)), theirs in swapped, theirs in flat)
            for theirs, parts in found.items()
        ]

    @property
    def roots(self) -> dict[str, str]:
        """First part of each name in the file, of a list of blocks or of a module -> diffusers'."""
        found: dict[str, str] = {}
        for theirs, ours in self.names.items():
            first = ours if isinstance(ours, str) else ours[0]
            found.setdefault(theirs.partition(".")[0], first.partition(".")[0])
        return found

    def tails(self, ours: str, part: str) -> list[str]:
        """What single files call a part of the blocks of one of diffusers' lists; only what lies there by itself."""
        beginnings = (f"{ours}.*.{part}.", f"{ours}.*.{part}")
        return [
            theirs.partition(".*.")[2]
            for theirs, origin in self.names.items()
            if isinstance(origin, str) and (origin == beginnings[1] or origin.startswith(beginnings[0]))
        ]

    def _place(self, name: str) -> tuple[str, int, int]:
        """Name in the file, place among the tensors that lie together there, and how many these are."""
        best: tuple[int, str, int, int] | None = None
        for theirs, ours in self.names.items():
            origins = [ours] if isinstance(ours, str) else ours
            for row, origin in enumerate(origins):
                if (best is None or len(origin) > best[0]) and (match := _pattern(origin).fullmatch(name)):
                    *numbers, rest = match.groups()
                    best = (len(origin), _filled(theirs, numbers) + rest, row, len(origins))
        if best is None:
            raise UserError(f"what single files call '{name}' is not known here")
        return best[1:]


@lru_cache(None)
def _pattern(beginning: str) -> re.Pattern[str]:
    """Matches names that begin so; its groups are the numbers, and the rest."""
    rest = r"((?:\..*)?)" if beginning else "(.*)"
    return re.compile(re.escape(beginning).replace(r"\*", r"(\d+)") + rest)


def _filled(beginning: str, numbers: Iterable[str]) -> str:
    for number in numbers:
        beginning = beginning.replace("*", number, 1)
    return beginning


def _matching(patterns: Iterable[str], names: Mapping[str, Any]) -> Iterator[str]:
    """Names that one of the patterns begins; `-1` in a pattern is the highest number there."""
    for pattern in patterns:
        first, last, _ = pattern.partition(".-1.")
        if last:
            numbers = [int(name[len(first) + 1 :].partition(".")[0]) for name in names if name.startswith(f"{first}.")]
            pattern = pattern.replace(".-1.", f".{max(numbers)}.") if numbers else pattern
        yield from (name for name in names if _pattern(pattern).fullmatch(name))


def load_names() -> dict[str, Names]:
    """Class of a transformer -> the names of its family."""
    table: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())
    return {name: Names(**entry) for name, entry in table.items() if name[0] != "."}


def to_file(names: Names, config: Mapping[str, Any], tensors: Sources) -> dict[str, Source]:
    """A model's tensors as a single file has them; nothing is loaded.

    Args:
        config: the model's; says which marks are set.

    Raises:
        UserError: a tensor has no place in the file.
    """
    file = {place.name: _joined(place, [tensors[name] for name in place.origins]) for place in names.places(tensors)}
    for mark, key in names.marks.items():
        if config.get(key):
            file[mark] = Source(torch.Size([0]), torch.float32, lambda: torch.zeros(0))
    return file


def from_file(names: Names, wanted: Mapping[str, Tensor], file: Sources) -> dict[str, Source]:
    """A single file's tensors as diffusers has them; nothing is loaded.

    Args:
        wanted: the state dict of an empty model; its shapes say where to cut.
        file: whole, with or without `PREFIX`.

    Raises:
        UserError: the file lacks a tensor, has one too many or one of another shape.
    """
    file = {name.removeprefix(PREFIX): source for name, source in file.items()}
    found: dict[str, Source] = {}
    places = names.places(wanted)
    for place in places:
        source = file.get(place.name)
        if source is None:
            raise UserError(f"tensor '{place.name}' is missing")
        shapes = [wanted[name].shape for name in place.origins]
        whole = _shape(place, shapes)
        if source.shape != whole:
            raise UserError(f"tensor '{place.name}' has shape {list(source.shape)} in place of {list(whole)}")
        start = 0
        for name, shape in zip(place.origins, shapes, strict=True):
            found[name] = _cut(place, source, start, shape)
            start += shape[0] if shape else 0
    known = {place.name for place in places} | set(names.marks)
    if strange := sorted(set(file) - known):
        raise UserError(f"tensor '{strange[0]}' is of another model")
    return found


def _shape(place: Place, shapes: list[torch.Size]) -> torch.Size:
    """Of the file's tensor."""
    if place.flat:
        return torch.Size([sum(shape.numel() for shape in shapes)])
    if len(shapes) == 1:
        return shapes[0]
    return torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])


def _joined(place: Place, sources: list[Source]) -> Source:
    if sources == sources[:1] and not place.swapped and not place.flat:
        return sources[0]

    def load() -> Tensor:
        tensor = torch.cat([source.load() for source in sources]) if len(sources) > 1 else sources[0].load()
        tensor = _other_order(tensor) if place.swapped else tensor
        return tensor.flatten() if place.flat else tensor

    return Source(_shape(place, [source.shape for source in sources]), sources[0].dtype, load)


def _cut(place: Place, source: Source, start: int, shape: torch.Size) -> Source:
    def load() -> Tensor:
        tensor = source.load()
        tensor = _other_order(tensor) if place.swapped else tensor
        if len(place.origins) == 1:
            return tensor.reshape(shape)
        return tensor[start : start + shape[0]].clone()

    return Source(shape, source.dtype, load)


def _other_order(tensor: Tensor) -> Tensor:
    """Scale and shift as shift and scale, and back."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
