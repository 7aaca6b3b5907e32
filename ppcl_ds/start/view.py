"""`ppcl recipe`: what a run will use, key by key, and all keys there are, as a JSON schema for editors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ppcl_ds.recipe import Recipe, checked
from ppcl_ds.recipe_file import BASE, RecipeFile, read_recipe_file

DEFAULT = "default"


def show(path: Path, changes: list[str]) -> None:
    """Print a recipe with its bases, changes and defaults, as a recipe that says the same; what the file itself does
    not say has a comment that says where it comes from.

    Raises:
        UserError: the recipe is wrong.
    """
    file = read_recipe_file(path, changes)
    recipe = checked(path, file)
    lines = [f"# {path}, as a run uses it. Keys without a comment stand there."]
    lines += _lines(recipe.model_dump(mode="json"), file, ())
    print("\n".join(lines))


def _lines(node: Mapping[str, Any], file: RecipeFile, place: tuple[str, ...]) -> Iterator[str]:
    indent = "  " * len(place)
    for key, value in node.items():
        below = (*place, key)
        name = _flow(key)
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, file, below)
        else:
            sources = (file.sources[at] for at in _upwards(below) if at in file.sources)
            said = next(sources, DEFAULT) if _says(file, below) else DEFAULT
            line = f"{indent}{name}: {_flow(value)}"
            yield f"{line:<60} # {said}" if said else line


def _upwards(place: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return (place[:length] for length in range(len(place), 0, -1))


def _says(file: RecipeFile, place: tuple[str, ...]) -> bool:
    """Whether the recipe has a value there, or one of another shape above."""
    node: Any = file.raw
    for key in place:
        if not isinstance(node, dict):
            return True
        if key not in node:
            return False
        node = node[key]
    return True


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def print_schema() -> None:
    """Print the JSON schema of recipes."""
    print(json.dumps(schema(), indent=1))


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe file, each key with what `sections.py` says of it."""
    found = Recipe.model_json_schema()
    sizes = [found["$defs"]["Data"]["properties"][key] for key in ("shard_size", "cache")]
    for size in sizes:
        size["anyOf"] = [{"type": size.pop("type", "integer")}, {"type": "string"}]  # such as 500MB
    words = "Another recipe that this one builds on, seen from this file's folder: its keys count where this has none."
    found["properties"][BASE] = {"type": "string", "title": "Base", "description": words}
    for section in (found, *found["$defs"].values()):
        section.pop("required", None)  # what is missing may stand in the base
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | found
