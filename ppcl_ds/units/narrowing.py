"""Width units on the way out: from a stock model with fewer blocks to one of the classes in `modeling_pruned.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.sources import Source, Sources
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import Plan, UnitPlan, modulated

Config = dict[str, Any]
Tensors = dict[str, Source]


def narrowed(
    teacher: Teacher,
    plan: Plan,
    variant: str,
    config: Config,
    tensors: Tensors,
    units: Callable[[UnitPlan], Sources],
) -> tuple[Config, Tensors]:
    """Configuration and tensors of a variant with its width units; as they came, if it has none.

    Args:
        config, tensors: of the variant with its depth units alone, a model of the stock class.
        units: gives a unit's tensors by their name inside the unit.
    """
    width = plan.width_units(variant)
    if not width:
        return config, tensors
    smaller = Anatomy(teacher.files.empty_model(config)).blocks
    keys = {origin: block.key for (origin, _), block in zip(plan.places(variant), smaller, strict=True)}
    config = config | {"_class_name": f"Pruned{teacher.class_name}"}
    config |= {"linear_text": [], "text_jumps": [], "narrow_ffn": {}}
    tensors = dict(tensors)
    for unit in width:
        put_in = _put_text if unit.kind == "text" else _put_ffn
        put_in(unit, units(unit), teacher.anatomy, keys, config, tensors)
    return config, tensors


def _put_ffn(
    unit: UnitPlan, own: Sources, anatomy: Anatomy, keys: dict[int, str], config: Config, tensors: Tensors
) -> None:
    block = anatomy.blocks[unit.span[0]]
    for stream in unit.streams:
        part = f"{keys[block.index]}.{block.ffn[stream]}"
        like = _take_out(part, tensors)
        new = {name.removeprefix(f"{stream}."): source for name, source in own.items() if name.startswith(f"{stream}.")}
        config["narrow_ffn"][part] = new["net.2.weight"].shape[1] if "net.2.weight" in new else 0
        tensors |= {f"{part}.{name}": source.to(like.dtype) for name, source in new.items()}


def _put_text(
    unit: UnitPlan, own: Sources, anatomy: Anatomy, keys: dict[int, str], config: Config, tensors: Tensors
) -> None:
    for member in unit.members:
        key = keys[member]
        config["linear_text"].append(key)
        for part in anatomy.blocks[member].text_only:
            like = _take_out(f"{key}.{part}", tensors)
        linears = {"text_in": modulated(member)}
        if member == unit.span[1] and "text" in unit.streams:
            linears["text_out"] = "text"
            config["text_jumps"].append(key)
        for name, output in linears.items():
            for kind in ("weight", "bias"):
                tensors[f"{key}.{name}.{kind}"] = own[f"{output}.{kind}"].to(like.dtype)


def _take_out(part: str, tensors: Tensors) -> Source:
    """Remove a part's tensors; returns one of them, for its number format."""
    gone = [tensors.pop(name) for name in list(tensors) if name.startswith(f"{part}.")]
    return gone[0]
