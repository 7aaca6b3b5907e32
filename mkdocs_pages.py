"""Pages of the site that the code itself writes: recipe, commands, changelog; a hook of MkDocs."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click
from typer.main import get_command

import data_tools.cli
import ppcl_ds.cli
from ppcl_ds.recipe import Recipe

_REPOSITORY = Path(__file__).parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "reference/recipe.md": recipe_page(),
        "reference/commands.md": commands_page(),
        "changelog.md": changelog_page(),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def recipe_page() -> str:
    """Every key of a recipe, its default and its meaning, from the models that check it."""
    lines = [
        "# The recipe",
        "",
        "A recipe is a YAML file that says everything about a run. A key in bold has no default. Unknown keys, and",
        "values that cannot be, are refused in one line. `ppcl init` writes one for your pipeline, data and GPUs.",
        "",
        *_section("Keys of the run itself", Recipe),
    ]
    for model, path in _SECTIONS.items():
        lines += ["", *_section(f"`{path}`", model)]
    return "\n".join(lines) + "\n"


def _sections(model: type[BaseModel], path: str = "") -> dict[type[BaseModel], str]:
    """Every model below another one, and the first key that has it, such as `distill.optimizer`."""
    found: dict[type[BaseModel], str] = {}
    for name, field in model.model_fields.items():
        for each in _models(field.annotation):
            inner = f"{path}.{name}" if path else name
            found = found | {k: v for k, v in {each: inner, **_sections(each, inner)}.items() if k not in found}
    return found


def _section(title: str, model: type[BaseModel]) -> list[str]:
    lines = [
        f"## {title}",
        "",
        " ".join((model.__doc__ or "").split()),
        "",
        "| key | default | meaning |",
        "| --- | --- | --- |",
    ]
    for name, field in model.model_fields.items():
        key = f"`{name}`" if not field.is_required() else f"**`{name}`**"
        lines.append(f"| {key} | {_default(field)} | {_meaning(field)} |")
    return lines


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its own defaults"
    if value is None or (not value and isinstance(value, str | tuple | dict)):
        return "none"
    if isinstance(value, Path) and value.is_relative_to(_REPOSITORY):
        value = value.relative_to(_REPOSITORY)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _meaning(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).replace("|", "\\|")
    keys = [_SECTIONS[model] for model in _models(field.annotation)][:1]
    inner = [f"see [`{key}`](#{key.replace('.', '').lower()})" for key in keys]
    choices = [f"`{each}`" for each in _choices(field.annotation)]
    return "; ".join(part for part in (text, *inner, f"one of {', '.join(choices)}" if choices else "") if part)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside an annotation."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if issubclass(annotation, BaseModel):
            yield annotation
    else:
        for each in get_args(annotation):
            yield from _models(each)


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return [choice for each in get_args(annotation) for choice in _choices(each)]
    return list(get_args(annotation)) if str(annotation).startswith("typing.Literal") else []


def commands_page() -> str:
    """Every command with its options, as `--help` says them."""
    pages = ["# Commands\n"]
    for name, module in (("ppcl", ppcl_ds.cli), ("ppcl-data", data_tools.cli)):
        command = get_command(module.app)
        context: Any = command.make_context(name, [], resilient_parsing=True)
        text = get_docs_for_click(obj=command, ctx=context, name=name)
        text = re.sub(r"\[/?\w*\]", "`", text)  # rich's marks of what is typed
        pages.append(re.sub(r"^(#+) ", r"#\1 ", text, flags=re.MULTILINE))
    return "\n".join(pages)


def changelog_page() -> str:
    """CHANGELOG.md, which stands at the top of the repository."""
    return (_REPOSITORY / "CHANGELOG.md").read_text().replace("](docs/", "](")


_SECTIONS = _sections(Recipe)
