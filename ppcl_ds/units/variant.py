"""A variant as a diffusers model: laid out before any tensor is read, or assembled in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.files import Source, Sources, empty_model, held, pruned_class
from ppcl_ds.teacher.surgery import lay_out
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.kinds import build_unit
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.units.spec import Export


@dataclass(frozen=True)
class Layout:
    """A whole model before any of its tensors is read; all that export needs to know of it.

    Attributes:
        config: the content of its `config.json`.
        tensors: its state dict, in order.
        parameters: how many it has; buffers do not count.
    """

    config: dict[str, Any]
    tensors: Sources
    parameters: int

    @property
    def bytes(self) -> int:
        return sum(source.bytes for source in self.tensors.values())


Trained = Callable[[UnitPlan], Mapping[str, Tensor]]
"""Gives a unit's tensors by their name inside the unit; of a depth unit, those of the teacher's block class."""


def layout(
    teacher: Teacher,
    plan: Plan,
    variant: str,
    units: Callable[[UnitPlan], Sources],
    dtype: torch.dtype | None = None,
) -> Layout:
    """A variant as a model of the teacher's stock class, or with width units of its sibling in `modeling_pruned.py`.

    Args:
        units: gives a unit's tensors by their name inside the unit.
        dtype: of the weights, except where the family insists on float32; None: that of the teacher's files.

    Raises:
        UserError: see `laid_out`.
    """

    def own(unit: UnitPlan) -> dict[str, Source]:
        return {name: replace(source, unit=unit.name) for name, source in units(unit).items()}

    places = [(origin, None if unit is None else own(unit)) for origin, unit in plan.places(variant)]
    config, found = lay_out(teacher, places)
    config, found = _without_parts(teacher, plan, variant, config, found, own)
    if dtype is not None:
        found = {
            name: source.to(teacher.files.runs_as(name, dtype)) if source.dtype.is_floating_point else source
            for name, source in found.items()
        }
    return laid_out(f"variant '{variant}'", config, found)


def _without_parts(
    teacher: Teacher,
    plan: Plan,
    variant: str,
    config: dict[str, Any],
    tensors: dict[str, Source],
    units: Callable[[UnitPlan], Sources],
) -> tuple[dict[str, Any], dict[str, Source]]:
    """Configuration and tensors of a variant with its width units; as they came, if it has none.

    Args:
        config, tensors: of the variant with its depth units alone, a model of the stock class.
        units: gives a unit's tensors by their name inside the unit.
    """
    width = plan.width_units(variant)
    if not width:
        return config, tensors
    stock = teacher.files.empty_model(config)
    smaller = Anatomy(stock, teacher.flows).blocks
    keys = {origin: block.key for (origin, _), block in zip(plan.places(variant), smaller, strict=True)}
    config = config | {"_class_name": pruned_class(teacher.class_name)}
    config |= {"linear_text": [], "text_jumps": [], "narrow_ffn": {}}
    model = Export(keys, config, dict(tensors), stock)
    for unit in width:
        unit.behaviour.export(unit, units(unit), teacher.anatomy, model)
    return model.config, model.tensors


def laid_out(what: str, config: dict[str, Any], found: Sources) -> Layout:
    """A model of the class that a configuration names, from these tensors.

    Args:
        what: names the model in messages.

    Raises:
        UserError: a tensor of the class is missing, has another shape, or is not of the class.
    """
    model: Any = empty_model(config)
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape:
            has = f"has shape {list(found[name].shape)}" if name in found else "is missing"
            raise UserError(f"{what}: tensor '{name}' {has}, but {config['_class_name']} wants {list(tensor.shape)}")
    if strange := sorted(set(found) - set(wanted)):
        raise UserError(f"{what}: tensor '{strange[0]}' is not of a {config['_class_name']} with this configuration")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Layout(json.loads(model.to_json_string()), {name: found[name] for name in wanted}, parameters)


def assembled(teacher: Teacher, plan: Plan, variant: str, trained: Trained | None) -> ModelMixin:
    """A variant in memory.

    Args:
        trained: None has units as they are built: of a depth unit, a copy of its span's first block.
    """

    def tensors(unit: UnitPlan) -> Sources:
        fresh = build_unit(unit, teacher, torch.float32).core.state_dict() if trained is None else trained(unit)
        return held(fresh)

    whole = layout(teacher, plan, variant, tensors)
    model: Any = teacher.files.empty_model(whole.config)
    model.load_state_dict({name: source.load() for name, source in whole.tensors.items()}, assign=True)
    return model
