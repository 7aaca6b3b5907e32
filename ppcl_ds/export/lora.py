"""`ppcl lora remap`: a LoRA of the teacher as a LoRA of a variant."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import yaml
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ppcl_ds.atomic import atomic_write
from ppcl_ds.errors import UserError, brief
from ppcl_ds.export import check_lora
from ppcl_ds.export.names import Names, load_names
from ppcl_ds.export.parts import parts_of
from ppcl_ds.export.renumber import Numbering, Renamed, renumber_metadata
from ppcl_ds.recipe import TrainingFolder
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import Plan, load_plan

_MARKS = re.compile(r"lora|lokr_|hada_|oft_|dora_scale|\.diff(_b)?$")
"""What the names of LoRA, LoKr, LoHa, OFT and DoRA tensors hold, and of whole differences."""

STRATEGIES = ("drop", "nearest")
"""What becomes of a block that a depth unit replaces: dropped, or given to the unit if it started from that block."""


def remap(
    lora: Path,
    plan_file: Path,
    variant: str,
    teacher: Path | None = None,
    out: Path | None = None,
    strategy: str = "drop",
) -> None:
    """Renumber LoRAs' blocks for a variant, drop what units replace, write the files and say what was dropped.

    Args:
        lora: a safetensors file, whose layout, tensors outside the blocks and metadata stay as they are; or a folder
            of such files. One that cannot be remapped is named, and does not keep the others from it.
        teacher: pipeline folder, of which configurations are enough; default: that of the run around the plan.
        out: default: beside `lora`, its name with `-VARIANT`; of a folder, a folder.
        strategy: of `STRATEGIES`.

    Raises:
        UserError: a LoRA, the plan, the variant or the teacher is not what it should be; the message names it.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"--strategy: '{strategy}' is not one of {', '.join(STRATEGIES)}")
    files = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
    check_lora(lora)
    numbers = numbering(plan_file, variant, _open(plan_file, teacher), strategy)
    if not lora.is_dir():
        _remap(lora, out or lora.with_name(f"{lora.stem}-{variant}.safetensors"), numbers, variant)
        return
    folder = out or lora.with_name(f"{lora.name}-{variant}")
    refused = []
    for file in files:
        try:
            _remap(file, folder / file.name, numbers, variant)
        except UserError as fault:
            print(fault)
            refused.append(file.name)
    if refused:
        raise UserError(f"{len(refused)} of {len(files)} LoRAs were not remapped: {', '.join(refused)}")


def _remap(lora: Path, out: Path, numbers: Numbering, variant: str) -> None:
    tensors, metadata = _read(lora)
    try:
        renamed = {key: numbers.rename(key) for key in tensors}
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
    try:
        atomic_write(out, safetensors.torch.save(left, metadata))
    except OSError as fault:
        raise UserError(f"{out}: {fault.strerror}") from None
    _report(numbers, renamed)
    print(f"wrote {out}")


def _read(lora: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file."""
    check_lora(lora)
    try:
        with safe_open(lora, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
            metadata = dict(opened.metadata() or {"format": "pt"})
    except (OSError, SafetensorError) as fault:
        raise UserError(f"LoRA {lora}: no readable safetensors file ({fault})") from None
    if not any(map(_MARKS.search, tensors)):
        raise UserError(f"LoRA {lora}: holds no LoRA; its first tensor is '{next(iter(tensors), '')}'")
    return tensors, metadata


def numbering(plan_file: Path, variant: str, teacher: Teacher, strategy: str = "drop") -> Numbering:
    """Old and new numbers of a teacher's blocks.

    Raises:
        UserError: the plan is not the teacher's, or has no such variant.
    """
    lists = Counter(block.list_name for block in teacher.blocks)
    plan = load_plan(plan_file, teacher)
    names = load_names().get(teacher.class_name, Names())
    parts = parts_of(teacher.anatomy, names)
    return Numbering(
        lists, _others(teacher.empty, lists), parts, plan, variant, names.roots, nearest=strategy == "nearest"
    )


def _open(plan_file: Path, teacher: Path | None) -> Teacher:
    """The teacher, as it was told, or that of the run around the plan."""
    if teacher is not None:
        return Teacher(teacher, weights=False)
    found = _trained_on(plan_file)
    if found is None:
        name = _read_plan(plan_file).teacher
        raise UserError(f"{plan_file}: no run beside it says where its {name} lies; give --teacher, a pipeline folder")
    return found


def _others(model: nn.Module, lists: Mapping[str, int] | list[str]) -> list[str]:
    return [name for name, _ in model.named_children() if name not in lists]


def _trained_on(plan_file: Path) -> Teacher | None:
    """The teacher that the run around the plan was trained on, if it is still there."""
    for recipe in (TrainingFolder(plan_file.parent, "distill").recipe, plan_file.parent / "recipe.json"):
        try:
            section = json.loads(recipe.read_text())["teacher"]
            folder = Path(section["path"])
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if folder.is_dir():
            told = {key: section[key] for key in ("component", "options") if key in section}
            return Teacher(folder, weights=False, **told)
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
