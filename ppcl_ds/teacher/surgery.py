"""Configuration surgery: the stock configuration of a model with fewer blocks, and its tensors' origins.

A smaller model of a stock class needs more than one number changed: the length of each block list, keys that hold
block positions (SD3's `dual_attention_layers`), modules beside the lists. Which these are is found by building empty
models (`keys.py`), or stands in the family's own file. Whether it is all is then checked: without weights, the smaller
model and the teacher with the same blocks bypassed are run, and must do the same operations on the same parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ppcl_ds.errors import UserError, brief
from ppcl_ds.teacher.anatomy import Anatomy, block_shapes
from ppcl_ds.teacher.files import Source, Sources, find_class, pruned_class
from ppcl_ds.teacher.own import own_of
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.teacher.weightless import Trace


@dataclass(frozen=True)
class Shorter:
    """A smaller model of the teacher's stock class.

    Attributes:
        config: its configuration.
        origins: name of its tensor -> name of the teacher's.
        blocks: prefixes of its blocks' tensors, in order.
    """

    config: dict[str, Any]
    origins: Mapping[str, str]
    blocks: Sequence[str]


def shorten(teacher: Teacher, kept: Sequence[int]) -> Shorter:
    """The stock model whose blocks are, in order, the teacher's blocks `kept`.

    Args:
        kept: numbers of blocks, ascending; between two of them, the blocks after the first are gone.

    Raises:
        UserError: the stock class cannot be configured so, or would compute something else.
    """
    known: dict[tuple[int, ...], Shorter] = teacher.shortened
    if tuple(kept) not in known:
        known[tuple(kept)] = _shortened(teacher, kept)
    return known[tuple(kept)]


def _shortened(teacher: Teacher, kept: Sequence[int]) -> Shorter:
    where = f"teacher {teacher.files.folder}"
    if len(kept) == len(teacher.blocks):
        keys = tuple(block.key for block in teacher.blocks)
        return Shorter(dict(teacher.files.config), {key: key for key in teacher.files.keys}, keys)
    if teacher.keeps_its_blocks:
        raise UserError(f"{where}: {teacher.class_name} cannot lose a block: {teacher.keeps_its_blocks}")
    positions: dict[str, list[int]] = {flow.name: [] for flow in teacher.flows}
    for index in kept:
        positions[teacher.blocks[index].list_name].append(teacher.blocks[index].position)
    for name, places in positions.items():
        if not places:
            raise UserError(f"{where}: a model cannot lose every block of '{name}'; keep at least one")
    _with_lists_beside(teacher, positions)
    keys = tuple(f"{flow.name}.{place}" for flow in teacher.flows for place in range(len(positions[flow.name])))
    shorter = Shorter(_config(teacher, positions), _origins(teacher, positions), keys)
    _check_equal(teacher, kept, shorter, _checked_model(teacher, kept, shorter))
    return shorter


def _length(teacher: Teacher, name: str) -> int:
    modules: Any = teacher.empty.get_submodule(name)
    return len(modules)


def _with_lists_beside(teacher: Teacher, positions: dict[str, list[int]]) -> None:
    """Add the lists that lose modules because others do: those that did not run, and those of a module a block."""
    for key, names in teacher.keys.lengths.items():
        ran = [name for name in sorted(names) if name in positions]
        if not ran:
            continue
        if len({len(positions[name]) for name in ran}) > 1:
            raise UserError(
                f"teacher {teacher.files.folder}: '{key}' is the length of {' and '.join(ran)}; "
                "they can only lose as many blocks each"
            )
        positions |= {name: positions[ran[0]] for name in names if name not in positions}
    for beside, lists in own_of(teacher.class_name).modules.items():
        places = _end_to_end(teacher, positions, lists)
        behind = range(sum(_length(teacher, name) for name in lists), _length(teacher, beside))
        positions[beside] = [*places, *behind]


def _end_to_end(teacher: Teacher, positions: Mapping[str, Sequence[int]], names: Sequence[str]) -> list[int]:
    """Numbers of what is kept, counted through several lists."""
    places: list[int] = []
    start = 0
    for name in names:
        places += [start + position for position in positions[name]]
        start += _length(teacher, name)
    return places


def _config(teacher: Teacher, positions: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    old, keys, own = teacher.files.config, teacher.keys, own_of(teacher.class_name)
    config = dict(old)
    if own.filled is not None:
        config |= own.filled(old)
    for name in (flow.name for flow in teacher.flows):
        if len(positions[name]) < _length(teacher, name) and not any(name in names for names in keys.lengths.values()):
            raise UserError(f"teacher {teacher.files.folder}: no key of config.json sets the length of '{name}'")
    for key, names in keys.lengths.items():
        if counts := [len(positions[name]) for name in sorted(names) if name in positions]:
            config[key] = counts[0]
    for key, name in keys.positions.items():
        if key not in own.behind:
            config[key] = [new for new, position in enumerate(positions[name]) if position in old[key]]
    for key, name in own.behind.items():
        config[key] = [sum(place <= behind for place in positions[name]) - 1 for behind in old[key]]
    for key, name in keys.first.items():
        config[key] = sum(place < old[key] for place in positions[name])
    for key, name in keys.last.items():
        config[key] = sum(place >= _length(teacher, name) - old[key] for place in positions[name])
    for key, lists in own.entries.items():
        places, whole = _end_to_end(teacher, positions, lists), config[key]
        config[key] = [whole[place] for place in places]
    if own.pruned is not None:
        config |= own.pruned(old, positions) | {"_class_name": pruned_class(teacher.class_name)}
    return config


def _origins(teacher: Teacher, positions: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Name of each tensor of the smaller model -> the teacher's."""
    found = {}
    new = {name: {old: place for place, old in enumerate(places)} for name, places in positions.items()}
    for key in sorted(teacher.files.keys):
        name = next((name for name in positions if key.startswith(f"{name}.")), None)
        if name is None:
            found[key] = key
            continue
        position, _, rest = key.removeprefix(f"{name}.").partition(".")
        if int(position) in new[name]:
            found[f"{name}.{new[name][int(position)]}.{rest}"] = key
    return found


def _checked_model(teacher: Teacher, kept: Sequence[int], shorter: Shorter) -> nn.Module:
    """The smaller model, empty, whose blocks are shaped like the teacher's."""
    try:
        smaller = teacher.files.empty_model(shorter.config)
    except Exception as fault:  # whatever the class says to a configuration that it cannot have
        raise UserError(
            f"teacher {teacher.files.folder}: {teacher.class_name} cannot have {len(kept)} blocks: {brief(fault)}"
        ) from None
    anatomy = Anatomy(smaller, teacher.flows)
    for block, origin in zip(anatomy.blocks, kept, strict=True):
        if block_shapes(anatomy.module(smaller, block)) != block_shapes(teacher.module(teacher.blocks[origin])):
            raise UserError(
                f"teacher {teacher.files.folder}: {teacher.class_name} cannot have a block shaped like its block "
                f"{origin} as number {block.position} of {block.list_name}"
            )
    return smaller


def _check_equal(teacher: Teacher, kept: Sequence[int], shorter: Shorter, smaller: nn.Module) -> None:
    """That the smaller model computes what the teacher does with the other blocks bypassed."""
    gone = sorted(set(range(len(teacher.blocks))) - set(kept))
    try:
        if own_of(teacher.class_name).small:
            same = _is_same_when_small(teacher, gone, shorter)
        else:
            own = _computed(teacher, smaller, shorter.origins)
            with teacher.anatomy.bypassed(teacher.empty, gone):
                same = own == _computed(teacher, teacher.empty, {})
    except Exception:  # such as an index that a block's number is
        same = False
    if not same:
        raise UserError(
            f"teacher {teacher.files.folder}: {teacher.class_name} without blocks {', '.join(map(str, gone))} would "
            "load and compute something else: it ties something to the numbers of its blocks"
        )


_CLOSE = 1e-5
"""Part of the largest number by which outputs may differ that the same numbers were added up to in another order."""


@torch.no_grad()
def _is_same_when_small(teacher: Teacher, gone: Sequence[int], shorter: Shorter) -> bool:
    """Whether they do, of models of as many blocks but few channels, with random weights."""
    small = dict(own_of(teacher.class_name).small)
    whole, fewer = (
        find_class(config["_class_name"]).from_config(config | small).eval()
        for config in (teacher.files.config, shorter.config)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in whole.parameters():
        parameter.normal_(std=0.1, generator=generator)
    tensors = whole.state_dict()
    fewer.load_state_dict({name: tensors[origin] for name, origin in shorter.origins.items()})
    with teacher.anatomy.bypassed(whole, gone):
        expected = pytree.tree_leaves(teacher.run(whole))
    pairs = list(zip(pytree.tree_leaves(teacher.run(fewer)), expected, strict=True))
    return all(bool((own - other).abs().max() <= _CLOSE * other.abs().max()) for own, other in pairs)


@torch.no_grad()
def _computed(teacher: Teacher, model: nn.Module, names: Mapping[str, str]) -> list[str]:
    """What a model's output was computed from, and how; see `Trace`."""
    with Trace(model, names) as trace:
        output = teacher.run(model)
    return [trace.name(leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


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
    shorter = shorten(teacher, [origin for origin, _ in places])
    tensors = {name: teacher.files.source(origin) for name, origin in shorter.origins.items()}
    for key, (origin, unit) in zip(shorter.blocks, places, strict=True):
        for name, source in (unit or {}).items():
            # Stored as the teacher stores the tensor that it replaces: some families keep a few in float32.
            like = tensors.get(f"{key}.{name}")
            if like is None:
                raise UserError(
                    f"teacher {teacher.files.folder}: block {origin} has no tensor '{name}', but its unit has"
                )
            tensors[f"{key}.{name}"] = source.to(like.dtype)
    return shorter.config, tensors
