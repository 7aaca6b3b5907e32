"""Configuration surgery: the stock configuration of a model with fewer blocks, and its tensors' origins.

A smaller model of a stock class needs more than one number changed: the length of each block list, and every key that
holds block positions (SD3's `dual_attention_layers`). Which keys these are is found by building empty models and
looking at their shapes, so that no family is written down here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.files import ModelFiles
from ppcl_ds.teacher.sources import Source, Sources

Shapes = dict[str, torch.Size]


def block_shapes(module: nn.Module) -> Shapes:
    """Name -> shape of every tensor in a block's state dict."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def length_keys(files: ModelFiles, anatomy: Anatomy) -> dict[str, str]:
    """Block list -> the configuration key that sets its length.

    Raises:
        UserError: no single key sets the length of a list.
    """
    names = list(dict.fromkeys(block.list_name for block in anatomy.blocks))
    keys: dict[str, str] = {}
    for name in names:
        length = sum(block.list_name == name for block in anatomy.blocks)
        for key, value in files.config.items():
            if value != length or isinstance(value, bool):
                continue
            longer = _try_model(files, {**files.config, key: length + 1})
            if longer is not None and len(getattr(longer, name)) == length + 1:
                keys[name] = key
        if name not in keys:
            raise UserError(f"teacher {files.folder}: no key of config.json sets the length of '{name}'")
    return keys


def shrink_config(files: ModelFiles, anatomy: Anatomy, origins: Sequence[int]) -> dict[str, Any]:
    """The configuration of a model whose blocks have the shapes of the teacher's blocks `origins`.

    Args:
        origins: for each block of the smaller model, in order, the teacher block whose shape it has.

    Raises:
        UserError: the stock class cannot be configured so.
    """
    config = dict(files.config)
    kept: dict[str, list[int]] = {}
    for index in origins:
        block = anatomy.blocks[index]
        kept.setdefault(block.list_name, []).append(block.position)
    for name, key in length_keys(files, anatomy).items():
        if name not in kept:
            raise UserError(f"teacher {files.folder}: a model cannot lose every block of '{name}'; keep at least one")
        config[key] = len(kept[name])
    # Only a key whose emptying changes the blocks holds positions; `axes_dims_rope` and the like do not.
    for key in _position_keys(files, anatomy):
        positions = next(iter(kept.values()))
        config[key] = [new for new, old in enumerate(positions) if old in files.config[key]]
    _check(files, anatomy, origins, config)
    return config


def _position_keys(files: ModelFiles, anatomy: Anatomy) -> list[str]:
    original = files.empty_model()
    found = []
    for key, value in files.config.items():
        is_positions = isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value)
        if not is_positions or max(value) >= len(anatomy):
            continue
        emptied = _try_model(files, {**files.config, key: []})
        if emptied is not None and _list_shapes(emptied, anatomy) != _list_shapes(original, anatomy):
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


def _check(files: ModelFiles, anatomy: Anatomy, origins: Sequence[int], config: dict[str, Any]) -> None:
    teacher, smaller = files.empty_model(), files.empty_model(config)
    for block, origin in zip(Anatomy(smaller).blocks, origins, strict=True):
        wanted = block_shapes(anatomy.module(teacher, anatomy.blocks[origin]))
        if block_shapes(Anatomy(smaller).module(smaller, block)) != wanted:
            raise UserError(
                f"teacher {files.folder}: {files.class_name} cannot have a block shaped like its block {origin} "
                f"as number {block.position} of {block.list_name}"
            )


def lay_out(
    files: ModelFiles, anatomy: Anatomy, places: Sequence[tuple[int, Sources | None]]
) -> tuple[dict[str, Any], dict[str, Source]]:
    """Configuration and tensors of a smaller model, before any tensor is read.

    Args:
        places: for each of its blocks, in order: the teacher block whose shape it has, and a unit's tensors by their
            name in the block, or None to take the teacher's.

    Returns:
        The configuration, and tensors by their name in the stock class, in no particular order.

    Raises:
        UserError: the stock class cannot be configured so, or a unit has a tensor that its block has not.
    """
    config = shrink_config(files, anatomy, [origin for origin, _ in places])
    smaller = Anatomy(files.empty_model(config))
    lists = {f"{block.list_name}." for block in anatomy.blocks}
    tensors = {key: files.source(key) for key in sorted(files.keys) if not key.startswith(tuple(lists))}
    for block, (origin, unit) in zip(smaller.blocks, places, strict=True):
        old = anatomy.blocks[origin].key
        if unit is None:
            own = {key: files.source(key) for key in sorted(files.keys) if key.startswith(f"{old}.")}
            tensors |= {key.replace(old, block.key, 1): source for key, source in own.items()}
        else:
            # Stored as the teacher stores the tensor that it replaces: some families keep a few in float32.
            strange = [name for name in unit if f"{old}.{name}" not in files.keys]
            if strange:
                raise UserError(
                    f"teacher {files.folder}: block {origin} has no tensor '{strange[0]}', but its unit has"
                )
            own = {name: source.to(files.source(f"{old}.{name}").dtype) for name, source in unit.items()}
            tensors |= {f"{block.key}.{name}": source for name, source in own.items()}
    return config, tensors
