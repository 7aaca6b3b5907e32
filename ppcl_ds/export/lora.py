"""`ppcl lora remap`: a LoRA of the teacher as a LoRA of a variant."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import diffusers
import safetensors.torch
import yaml
from accelerate import init_empty_weights
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ppcl_ds.atomic import atomic_write
from ppcl_ds.errors import UserError, brief
from ppcl_ds.export.parts import parts_of
from ppcl_ds.export.renumber import Numbering, Renamed, renumber_metadata
from ppcl_ds.recipe import TrainingFolder
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import Plan, UnitPlan, conflict, load_plan

_MARKS = ("lora", "lokr_", "hada_")
"""What the names of LoRA, LoKr and LoHa tensors hold."""


def remap(lora: Path, plan_file: Path, variant: str, teacher: Path | None = None, out: Path | None = None) -> None:
    """Renumber a LoRA's blocks for a variant, drop what units replace, write the file and say what was dropped.

    Args:
        lora: a safetensors file; its layout, tensors outside the blocks and metadata stay as they are.
        teacher: folder whose `config.json` gives the lengths of the block lists, where the plan does not.
        out: default: beside `lora`, its name with `-VARIANT`.

    Raises:
        UserError: the LoRA, the plan, the variant or the teacher is not what it should be; the message names it.
    """
    numbering = _numbering(plan_file, variant, teacher)
    tensors, metadata = _read(lora)
    try:
        renamed = {key: numbering.rename(key) for key in tensors}
    except UserError as fault:
        raise UserError(f"LoRA {lora}: {fault}; is it one of another model?") from None
    left = {new.name: tensors[old] for old, new in renamed.items() if new.name is not None}
    if not left:
        raise UserError(f"LoRA {lora}: variant '{variant}' has none of the parts that it changes; nothing is left")
    if LORA_ADAPTER_METADATA_KEY in metadata:
        try:
            metadata[LORA_ADAPTER_METADATA_KEY] = renumber_metadata(metadata[LORA_ADAPTER_METADATA_KEY], renamed)
        except (ValueError, TypeError) as fault:
            raise UserError(f"LoRA {lora}: its {LORA_ADAPTER_METADATA_KEY} cannot be read ({fault})") from None
    out = out or lora.with_name(f"{lora.stem}-{variant}.safetensors")
    try:
        atomic_write(out, safetensors.torch.save(left, metadata))
    except OSError as fault:
        raise UserError(f"{out}: {fault.strerror}") from None
    _report(numbering, renamed)
    print(f"wrote {out}")


def _read(lora: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file."""
    if not lora.is_file():
        raise UserError(f"LoRA {lora}: there is no such file")
    if lora.suffix != ".safetensors":
        raise UserError(f"LoRA {lora}: only .safetensors files are read; a pickle file could run anything")
    try:
        with safe_open(lora, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
            metadata = dict(opened.metadata() or {"format": "pt"})
    except (OSError, SafetensorError) as fault:
        raise UserError(f"LoRA {lora}: no readable safetensors file ({fault})") from None
    if not any(mark in key for key in tensors for mark in _MARKS):
        raise UserError(f"LoRA {lora}: holds no LoRA; its first tensor is '{next(iter(tensors), '')}'")
    return tensors, metadata


def _numbering(plan_file: Path, variant: str, teacher: Path | None) -> Numbering:
    """Old and new numbers; of the teacher no more is read than is needed."""
    plan = _read_plan(plan_file)
    if teacher is None:
        model = _usual_model(plan.teacher)
        parts = parts_of(Anatomy(model)) if model else {}
        names = list(parts)
        if model and len(names) == 1:
            _check(plan_file, plan, variant)
            return Numbering({names[0]: plan.blocks}, _others(model, names), parts, plan, variant)
        teacher = _trained_on(plan_file)
        if teacher is None:
            why = f"has several lists of blocks ({', '.join(names)})" if names else "cannot be looked at by itself"
            raise UserError(f"{plan.teacher} {why}; give --teacher, of which config.json is enough")
    opened = Teacher(teacher, weights=False)
    lists = Counter(block.list_name for block in opened.blocks)
    plan = load_plan(plan_file, opened)
    return Numbering(lists, _others(opened.empty, lists), parts_of(opened.anatomy), plan, variant)


def _others(model: nn.Module, lists: Mapping[str, int] | list[str]) -> list[str]:
    return [name for name, _ in model.named_children() if name not in lists]


def _usual_model(class_name: str) -> nn.Module | None:
    """An empty model as its class makes it without a word: its lists and parts are called as in every other one."""
    model_class = getattr(diffusers, class_name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, nn.Module):
        raise UserError(f"the plan's teacher is a '{class_name}', which diffusers does not have")
    try:
        with init_empty_weights(include_buffers=False):
            return model_class()
    except TypeError:  # arguments without defaults
        return None


def _trained_on(plan_file: Path) -> Path | None:
    """The teacher that the run around the plan was trained on, if it is still there."""
    for recipe in (TrainingFolder(plan_file.parent, "distill").recipe, plan_file.parent / "recipe.json"):
        try:
            teacher = Path(json.loads(recipe.read_text())["teacher"]["path"])
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if teacher.is_dir():
            return teacher
    return None


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.model_validate(yaml.safe_load(path.read_text()))
    except OSError as fault:
        raise UserError(f"plan {path}: {fault.strerror}") from None
    except yaml.YAMLError as fault:
        raise UserError(f"plan {path}: not valid YAML: {brief(fault)}") from None
    except ValidationError as fault:
        raise UserError(f"plan {path}: {brief(fault)}") from None


def _check(path: Path, plan: Plan, variant: str) -> None:
    """What `load_plan` would say of this variant, as far as it can be told without the teacher."""
    unknown = set(plan.variants.get(variant, ())) - {unit.name for unit in plan.units}
    if unknown:
        raise UserError(f"plan {path}: variant '{variant}' plugs unit '{min(unknown)}', which is not under units")
    units = plan.units_of(variant)
    if wrong := next((unit for unit in units if not _possible(unit, plan.blocks)), None):
        span = f"span {list(wrong.span)} is not possible with {plan.blocks} blocks"
        raise UserError(f"plan {path}: unit '{wrong.name}': {span}")
    if reason := next(filter(None, (conflict(a, b) for a, b in combinations(units, 2))), None):
        raise UserError(f"plan {path}: variant '{variant}': {reason}")


def _possible(unit: UnitPlan, blocks: int) -> bool:
    first, last = unit.span
    return 0 <= first <= last < blocks and (first == last) == unit.behaviour.one_block


def _report(numbering: Numbering, renamed: Mapping[str, Renamed]) -> None:
    """What was kept in a line, and what was dropped in a line for each unit."""
    stay = Counter(new.block for new in renamed.values() if new.name is not None)
    blocks = len(stay.keys() - {None})
    print(f"tensors kept: {stay.total() - stay[None]} in {blocks} blocks, {stay[None]} outside the blocks")
    for unit in numbering.units:
        of_unit = [new for new in renamed.values() if new.unit == unit]
        counts = Counter(new.block for new in of_unit if new.block is not None)
        if not counts:
            continue
        listed = ", ".join(f"{position} ({count})" for (_, position), count in sorted(counts.items()))
        tails = sorted({_short(new.tail) for new in of_unit})
        list_name = next(iter(counts))[0]
        print(f"tensors dropped, replaced by {unit}: {list_name} {listed}; of {', '.join(tails)}")


def _short(tail: str) -> str:
    """The module that a tensor of the LoRA belongs to."""
    return re.split(r"\.(?:lora|lokr|hada|alpha|dora)", tail)[0]
