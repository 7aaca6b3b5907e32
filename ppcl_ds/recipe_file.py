"""A recipe before it is checked: a YAML file, the files it builds on, and what the command line changes in it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ppcl_ds.errors import UserError, shown
from ppcl_ds.strict import expanded
from ppcl_ds.yaml_file import Place, read_yaml

BASE = "base"
"""Key of a recipe file that names another one, on which it builds."""

SET = "--set"


@dataclass
class RecipeFile:
    """What a recipe says, whoever says it.

    Attributes:
        raw: keys and values.
        lines: where each key stands: `line 3`, `line 3 of base.yaml`, `--set`.
        sources: where the value at each place comes from: empty, the name of the base's file, or `--set`.
    """

    raw: dict[Any, Any]
    lines: dict[Place, str] = field(default_factory=dict)
    sources: dict[Place, str] = field(default_factory=dict)

    def put(self, place: Place, value: Any, line: str, source: str) -> None:
        """Set a value. Of a mapping its keys one by one, the others stay; anything else is replaced."""
        node: Any = self.raw
        for key in place[:-1]:
            node = node[key]
        if not isinstance(value, Mapping) or not isinstance(node.get(place[-1]), dict):
            self.forget(place)
            node[place[-1]] = {} if isinstance(value, Mapping) else value
        self.lines[place], self.sources[place] = line, source

    def forget(self, place: Place) -> None:
        """Nobody knows any more where this and what lies below comes from."""
        for known in (self.lines, self.sources):
            for below in [each for each in known if each[: len(place)] == place]:
                del known[below]

    def lay(self, value: Any, lines: Mapping[Place, str], source: str, place: Place = ()) -> None:
        """Lay a tree over what is there: mappings are merged, anything else is replaced.

        Args:
            lines: of the places in the tree.
            place: where its root comes to lie.
        """
        if place:
            self.put(place, value, lines.get(place, source), source)
        if isinstance(value, Mapping):
            for key, below in value.items():
                self.lay(below, lines, source, (*place, key))
        else:
            self.lines |= {below: line for below, line in lines.items() if place and below[: len(place)] == place}


def read_recipe_file(path: Path, changes: Sequence[str] = ()) -> RecipeFile:
    """A recipe with its bases below it and changes on top.

    `base: other.yaml` in a file names the one that it builds on, seen from its own folder, which may build on another.

    Args:
        changes: `KEY=VALUE` each, see `parse_change`.

    Raises:
        UserError: a file is missing or no YAML; files build on each other in a circle; a change cannot be read.
    """
    found = RecipeFile({})
    files = _with_bases(path)
    for place, (file, raw, lines) in enumerate(reversed(files), 1):
        own = place == len(files)
        words = {at: f"line {line}" + ("" if own else f" of {file}") for at, line in lines.items()}
        found.lay({key: value for key, value in raw.items() if key != BASE}, words, "" if own else file.name)
    for change in changes:
        keys, value = parse_change(change)
        node: Any = found.raw
        for depth, key in enumerate(keys[:-1]):
            if not isinstance(node.get(key), dict):
                if node.get(key) is not None:
                    raise UserError(f"{SET} {change}: {'.'.join(keys[: depth + 1])} is no section; set all of it")
                found.put(keys[: depth + 1], {}, SET, SET)
            node = node[key]
        found.forget(keys)
        node.pop(keys[-1], None)
        found.lay(value, {}, SET, keys)
    return found


def parse_change(change: str) -> tuple[tuple[str, ...], Any]:
    """`distill.steps=10` as the keys and the value, which is read as YAML is.

    Raises:
        UserError: it has another form.
    """
    name, equals, text = change.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(key and key == key.strip() for key in keys):
        raise UserError(f"{SET} {shown(change)}: give KEY=VALUE, such as distill.steps=10")
    try:
        return keys, yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(
            f"{SET} {shown(change)}: the value is no YAML; a text may need quotes: {name}='\"...\"'"
        ) from None


def _with_bases(path: Path) -> list[tuple[Path, dict[Any, Any], dict[Place, int]]]:
    """A file, the one it builds on, and so on: path, content, lines."""
    files: list[tuple[Path, dict[Any, Any], dict[Place, int]]] = []
    while True:
        try:
            raw, lines = read_yaml(path)
        except UserError as fault:
            named = f", which {files[-1][0]} names as its base" if files else ""
            raise UserError(f"recipe {fault}{named}") from None
        if not isinstance(raw, dict):
            raise UserError(f"recipe {path}: expected keys and values, found {type(raw).__name__}")
        files.append((path, raw, lines))
        if BASE not in raw:
            return files
        base = raw[BASE]
        place = f"recipe {path}, line {lines[(BASE,)]}: {BASE}"
        if not isinstance(base, str):
            raise UserError(f"{place} must be the path of another recipe, not {shown(repr(base), 80)}")
        try:
            path = path.parent / expanded(base)
        except ValueError as fault:
            raise UserError(f"{place}: {fault}") from None
        if path.resolve() in (file.resolve() for file, _, _ in files):
            raise UserError(f"{place}: {shown(base)} builds on this file itself; leave one of the two out")


def typed(path: Path, changes: Sequence[str] = ()) -> str:
    """A recipe and its changes as they are typed behind a command."""
    return shlex.join([str(path), *(word for change in changes for word in (SET, change))])


def as_one_file(path: Path, changes: Sequence[str] = ()) -> str:
    """The content of one file that says by itself what a recipe says with its bases and with changes.

    Raises:
        UserError: see `read_recipe_file`.
    """
    file = read_recipe_file(path, changes)
    if not any(file.sources.values()):
        return path.read_text(encoding="utf-8-sig")
    made = yaml.safe_dump(file.raw, sort_keys=False, allow_unicode=True)
    return f"# {' '.join([str(path), *(f'{SET} {change}' for change in changes)])}\n{made}"
