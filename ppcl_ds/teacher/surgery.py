"""Configuration surgery: the stock configuration of a model with fewer blocks, and its tensors' origins.

A smaller model of a stock class needs more than one number changed: the length of each block list, and every key that
holds block positions (SD3's `dual_attention_layers`). Which keys these are is found by building empty models and
looking at their shapes, so that no family is written down here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.anatomy import Anatomy, Shapes, block_shapes
from ppcl_ds.teacher.files import ModelFiles, Source, Sources
from ppcl_ds.teacher.teacher import Teacher


def length_keys(teacher: Teacher) -> dict[str, str]:
    """Block list -> the configuration key that sets its length.

    Raises:
        UserError: no single key sets the length of a list.
    """
    names = list(dict.fromkeys(block.list_name for block in teacher.blocks))
    keys: dict[str, str] = {}
    for name in names:
        length = sum(block.list_name == name for block in teacher.blocks)
        for key, value in teacher.files.config.items():
            if value != length or isinstance(value, bool):
                continue
            longer = _try_model(teacher.files, {**teacher.files.config, key: length + 1})
            if longer is not None and len(getattr(longer, name)) == length + 1:
                keys[name] = key
        if name not in keys:
            raise UserError(f"teacher {teacher.files.folder}: no key of config.json sets the length of '{name}'")
    return keys


def shrink_config(teacher: Teacher, origins: Sequence[int]) -> dict[str, Any]:
    """The configuration of a model whose blocks have the shapes of the teacher's blocks `origins`.

    Args:
        origins: for each block of the smaller model, in order, the teacher block whose shape it has.

    Raises:
        UserError: the stock class cannot be configured so.
    """
    config = dict(teacher.files.config)
    kept: dict[str, list[int]] = {}
    for index in origins:
        block = teacher.blocks[index]
        kept.setdefault(block.list_name, []).append(block.position)
    for name, key in length_keys(teacher).items():
        if name not in kept:
            raise UserError(
                f"teacher {teacher.files.folder}: a model cannot lose every block of '{name}'; keep at least one"
            )
        config[key] = len(kept[name])
    # Only a key whose emptying changes the blocks holds positions; `axes_dims_rope` and the like do not.
    for key in _position_keys(teacher):
        positions = next(iter(kept.values()))
        config[key] = [new for new, old in enumerate(positions) if old in teacher.files.config[key]]
    _check(teacher, origins, config)
    return config


def _position_keys(teacher: Teacher) -> list[str]:
    found = []
    for key, value in teacher.files.config.items():
        is_positions = isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value)
        if not is_positions or max(value) >= len(teacher.blocks):
            continue
        emptied = _try_model(teacher.files, {**teacher.files.config, key: []})
        if emptied is not None and _list_shapes(emptied, teacher.anatomy) != _list_shapes(
            teacher.empty, teacher.anatomy
        ):
            found.append(key)
    return found


def _list_shapes(model: nn.Module, anatomy: Anatomy) -> list[Shapes]:
    return [block_shapes(anatomy.module(model, block)) for block in anatomy.blocks]


def _try_model(files: ModelFiles, config: dict[str, Any]) -> nn.Module | None:
    """An empty model, or None where the class does not accept the configuration (a guess that was wrong)."""
    try:
        return files.empty_model(config)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AssertionError):
        return None


def _check(teacher: Teacher, origins: Sequence[int], config: dict[str, Any]) -> None:
    smaller = teacher.files.empty_model(config)
    for block, origin in zip(Anatomy(smaller).blocks, origins, strict=True):
        wanted = block_shapes(teacher.module(teacher.blocks[origin]))
        if block_shapes(Anatomy(smaller).module(smaller, block)) != wanted:
            raise UserError(
                f"teacher {teacher.files.folder}: {teacher.class_name} cannot have a block shaped like its block "
                f"{origin} as number {block.position} of {block.list_name}"
            )


def lay_out(teacher: Teacher, places: Sequence[tuple[int, Sources | None]]) -> tuple[dict[str, Any], dict[str, Source]]:
    """Configuration and tensors of a smaller model, before any tensor is read.

    Args:
        places: for each of its blocks, in order: the teacher block whose shape it has, and a unit's tensors by their
            name in the block, or None to take the teacher's.

    Returns:
        The configuration, and tensors by their name in the stock class, in no particular order.

    Raises:
        UserError: the stock class cannot be configured so, or a unit has a tensor that its block has not.
    """
    config = shrink_config(teacher, [origin for origin, _ in places])
    smaller = Anatomy(teacher.files.empty_model(config))
    lists = {f"{block.list_name}." for block in teacher.blocks}
    tensors = {key: teacher.files.source(key) for key in sorted(teacher.files.keys) if not key.startswith(tuple(lists))}
    for block, (origin, unit) in zip(smaller.blocks, places, strict=True):
        old = teacher.blocks[origin].key
        if unit is None:
            own = {key: teacher.files.source(key) for key in sorted(teacher.files.keys) if key.startswith(f"{old}.")}
            tensors |= {key.replace(old, block.key, 1): source for key, source in own.items()}
        else:
            # Stored as the teacher stores the tensor that it replaces: some families keep a few in float32.
            strange = [name for name in unit if f"{old}.{name}" not in teacher.files.keys]
            if strange:
                raise UserError(
                    f"teacher {teacher.files.folder}: block {origin} has no tensor '{strange[0]}', but its unit has"
                )
            own = {name: source.to(teacher.files.source(f"{old}.{name}").dtype) for name, source in unit.items()}
            tensors |= {f"{block.key}.{name}": source for name, source in own.items()}
    return config, tensors
