"""Which keys of a transformer's configuration follow its blocks: found by building empty models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ppcl_ds.teacher.anatomy import Shapes, block_shapes
from ppcl_ds.teacher.files import ModelFiles
from ppcl_ds.teacher.flows import block_lists

_Lists = Mapping[str, Sequence[Shapes]]
"""Module list -> shapes of each of its modules."""


@dataclass(frozen=True)
class Keys:
    """Keys of a configuration that follow the blocks of a list.

    Attributes:
        lengths: key -> the module lists whose length it is, those that did not run included.
        positions: key that lists positions of blocks with a shape of their own -> their list.
        first, last: key -> the list whose first, or last, so many blocks have a shape of their own.
    """

    lengths: Mapping[str, frozenset[str]]
    positions: Mapping[str, str]
    first: Mapping[str, str]
    last: Mapping[str, str]


def find_keys(files: ModelFiles, empty: nn.Module, entries: Iterable[str]) -> Keys:
    """The keys of a teacher's configuration.

    Args:
        empty: its empty model.
        entries: keys that hold an entry a block.
    """
    own = _shapes(empty)
    most = max(map(len, own.values()))
    more = {key: [*value, value[-1]] for key in entries if (value := files.config.get(key))}
    lengths: dict[str, frozenset[str]] = {}
    positions: dict[str, str] = {}
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for key, value in files.config.items():
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most:
            lists = (
                _grown(own, _built(files, {key: value + 1, **more})) if value in map(len, own.values()) else frozenset()
            )
            if lists:
                lengths[key] = lists
            elif changed := _changed(own, _built(files, {key: value - 1})):
                name, place = changed
                if place == value - 1:
                    first[key] = name
                elif place == len(own[name]) - value:
                    last[key] = name
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
            # Only a key whose emptying changes blocks holds positions; `axes_dims_rope` and the like do not.
            emptied = _built(files, {key: []}) if max(value) < most else None
            if emptied and (names := [name for name in own if own[name] != emptied.get(name)]):
                positions[key] = names[0]
    return Keys(lengths, positions, first, last)


def _shapes(model: nn.Module) -> _Lists:
    return {name: [block_shapes(module) for module in modules] for name, modules in block_lists(model).items()}


def _built(files: ModelFiles, changes: dict[str, Any]) -> _Lists | None:
    """Lists of an empty model, or None where the class does not accept the configuration (a guess that was wrong)."""
    try:
        return _shapes(files.empty_model({**files.config, **changes}))
    except Exception:  # whatever the class makes of a number that it never expected
        return None


def _grown(own: _Lists, longer: _Lists | None) -> frozenset[str]:
    """Lists that have one module more."""
    if longer is None or own.keys() != longer.keys():
        return frozenset()
    return frozenset(name for name in own if len(longer[name]) == len(own[name]) + 1)


def _changed(own: _Lists, other: _Lists | None) -> tuple[str, int] | None:
    """The one place, if there is just one, at which the modules differ in shape."""
    if other is None or any(len(own[name]) != len(other.get(name, ())) for name in own):
        return None
    places = [(name, i) for name in own for i, shapes in enumerate(own[name]) if shapes != other[name][i]]
    return places[0] if len(places) == 1 else None
