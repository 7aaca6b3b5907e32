"""A YAML file that a person wrote, with the line of every key; what YAML would pass over in silence is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ppcl_ds.errors import UserError, missing, shown

Place = tuple[Any, ...]
"""Keys and numbers that lead to a value."""


def read_yaml(path: Path) -> tuple[Any, dict[Place, int]]:
    """What a file says, and the line of every key in it.

    Raises:
        UserError: it is missing, not UTF-8 or not YAML, or a key stands twice; the message names the line.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(missing(path)) from None
    except OSError as fault:
        raise UserError(f"{shown(path)}: {fault.strerror}") from None
    text = _text(path, data)
    lines: dict[Place, int] = {}
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _look(path, node, (), lines, set())
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{shown(path)}{line}: not valid YAML: {shown(fault.problem or fault.context)}") from None
    except (yaml.YAMLError, ValueError) as fault:  # a character or a date that there is not
        raise UserError(f"{shown(path)}: not valid YAML: {shown(' '.join(str(fault).split()))}") from None
    except RecursionError:
        raise UserError(f"{shown(path)}: not valid YAML: it is nested too deeply, or within itself") from None


def _text(path: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{shown(path)} is in UTF-16; save it as UTF-8") from None
        line = data.count(b"\n", 0, fault.start) + 1
        byte = f"byte 0x{data[fault.start]:02x}"
        raise UserError(f"{shown(path)}, line {line}: {byte} is not UTF-8 (Latin-1?); save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{shown(path)} holds NUL characters (UTF-16?); save it as UTF-8")
    return text


def _look(path: Path, node: yaml.Node, place: Place, lines: dict[Place, int], seen: set[int]) -> None:
    if id(node) in seen:
        return  # an anchor's content has its lines where it stands first
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            below = (*place, number)
            lines[below] = item.start_mark.line + 1
            _look(path, item, below, lines, seen)
    elif isinstance(node, yaml.MappingNode):
        own: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = (key.tag, str(key.value))
            if name in own and not key.tag.endswith(":merge"):
                twice = f"key '{shown(key.value, 60)}' stands in line {own[name]} already; keep one"
                raise UserError(f"{shown(path)}, line {line}: {twice}")
            own[name] = line
            below = (*place, key.value if isinstance(key.value, str) else name)
            lines[below] = line
            _look(path, value, below, lines, seen)
