"""`ppcl consolidate`: variants of a run as folders that diffusers, and with a single file ComfyUI, load."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ppcl_ds.atomic import atomic_folder, disk_errors_as_one_line, require_space
from ppcl_ds.console import track
from ppcl_ds.early import finetuned, untuned
from ppcl_ds.errors import UserError
from ppcl_ds.export import SHARD_SIZE, quantise
from ppcl_ds.export.card import (
    Facts,
    Quantised,
    UnitFacts,
    read_figures,
    teacher_name,
    teacher_terms,
    write_card,
)
from ppcl_ds.export.gguf_file import TYPES, check_package, gguf_tensors, write_gguf
from ppcl_ds.export.model_folder import (
    FACTS,
    MODELING,
    add_own_code,
    has_own_code,
    shard_bytes,
    write_file,
    write_model,
    write_sums,
)
from ppcl_ds.export.pipeline_folder import copied_bytes, name_transformer, pipeline_class, pipeline_files, place
from ppcl_ds.export.scaled import scaled
from ppcl_ds.export.single_files import TOOLS, single_file_tensors
from ppcl_ds.export.tuned import Tuned, open_tuned
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.anatomy import Block
from ppcl_ds.teacher.files import find_class
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import Checkpoint, newest_checkpoint, unit_sources
from ppcl_ds.units.kinds import blank_unit, parameters_saved
from ppcl_ds.units.plan import Plan, UnitPlan, conflict, load_plan
from ppcl_ds.units.variant import Layout, layout

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Form:
    """What an export looks like.

    Attributes:
        dtype: of the weights; a key of `FORMATS`; None: that of the teacher's files.
        max_shard_size: bytes of a weights file.
        single_file: the tool to add one file for; a key of `TOOLS`, or None.
        gguf: of `gguf_file.TYPES`, to add one GGUF file, for ComfyUI unless `single_file` names another tool; or None.
        quantize: a key of `quantise.PACKAGES`, or None.
    """

    dtype: str | None = None
    max_shard_size: int = shard_bytes(SHARD_SIZE)
    single_file: str | None = None
    gguf: str | None = None
    quantize: str | None = None

    @classmethod
    def checked(
        cls, dtype: str | None, max_shard_size: str, single_file: str | None, gguf: str | None, quantize: str | None
    ) -> Form:
        """A form from what the user wrote.

        Raises:
            UserError: one of them makes no sense, or this machine cannot quantise so.
        """
        for option, value, known in (
            ("--dtype", dtype, FORMATS),
            ("--single-file", single_file, TOOLS),
            ("--gguf", gguf, TYPES),
            ("--quantize", quantize, quantise.PACKAGES),
        ):
            if value is not None and value not in known:
                raise UserError(f"{option}: '{value}' is not one of {', '.join(known)}")
        if gguf is not None:
            check_package()
        if quantize is not None:
            quantise.check_backend(quantize)
            if single_file:
                raise UserError("--single-file and --quantize: the single file holds plain weights; give one of them")
        return cls(dtype, shard_bytes(max_shard_size), single_file, gguf, quantize)


def consolidate(
    recipe: Recipe, variants: list[str], form: Form, plug: Sequence[str] = (), out: Path | None = None
) -> None:
    """Write the named variants, or all; each folder appears whole or not at all.

    Args:
        plug: `UNIT=on` and `UNIT=off`, changes to the one variant.
        out: where the one variant goes; None: into the run folder.

    Raises:
        UserError: one line that says what is wrong.
    """
    export = Export(recipe, form)
    plan = export.plan
    names = list(dict.fromkeys(variants)) or export.names
    for name in names:
        export.check(name)  # an unknown name is refused before anything is written
    if (plug or out) and len(names) != 1:
        raise UserError(
            f"--plug and --out: for one variant at a time; add --variant, one of {', '.join(plan.variants)}"
        )
    if plug and names[0] not in plan.variants:
        raise UserError(f"--plug: the units of '{names[0]}' have been trained together; choose a variant of the plan")
    if plug and not out:
        raise UserError("--plug: what it makes is no variant of the plan, so give it a folder of its own with --out")
    if plug:
        plan = replug(plan, export.trained, names[0], read_switches(plug))
    if out:
        _check_out(out)
    for name in track(names, "consolidate", len(names)):
        export.write(plan, name, out or recipe.pruned(name).parent)


def _check_out(out: Path) -> None:
    """An export replaces the folder it is given, so it must be empty or an older export."""
    if out.exists() and not (out / FACTS).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something else already; give a new folder, or remove it yourself")


class Export:
    """A run's newest checkpoint, its teacher and the form in which variants are written.

    Raises:
        UserError: teacher or plan cannot be read; later on, the checkpoint.
    """

    def __init__(self, recipe: Recipe, form: Form) -> None:
        self.recipe, self.form = recipe, form
        self.teacher = open_teacher(recipe)
        self.plan = load_plan(recipe.plan_file, self.teacher)
        self.around = pipeline_files(recipe.teacher.folder, recipe.teacher.component)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The newest one of the run; what is asked for is checked before it is looked for."""
        return newest_checkpoint(self.recipe.distillation.checkpoints)

    @cached_property
    def trained(self) -> Plan:
        return load_plan(self.recipe.distillation.plan, self.teacher)

    @property
    def names(self) -> list[str]:
        """Everything that can be written; without a library of its own, what was fine-tuned from another run's."""
        recipe, plan = self.recipe, self.plan
        tuned = [finetuned(variant) for variant in plan.variants if recipe.finetuning(variant).begun]
        return [*(plan.variants if recipe.distillation.begun or not tuned else ()), *tuned]

    @lru_cache  # noqa: B019 - an export lives as long as its command
    def tuned(self, variant: str) -> Tuned:
        """What fine-tuning left of a variant."""
        return open_tuned(self.recipe.finetuning(variant))

    def check(self, name: str) -> None:
        """Refuse what cannot be written.

        Raises:
            UserError: the plan has no such variant; or it has not been fine-tuned, or with other units.
        """
        variant = untuned(name)
        units = self.plan.units_of(variant)
        if name == variant:
            return
        if not self.recipe.finetuning(variant).begun:
            raise UserError(f"'{name}' is not there yet; run `ppcl finetune RECIPE --variant {variant}` first")
        folder = self.recipe.finetuning(variant)
        before = load_plan(folder.plan, self.teacher).units_of(variant)
        if units != before:
            plan = self.recipe.plan_file
            raise UserError(
                f"{folder.path} was trained with other units than '{variant}' in {plan} has now; name other variants "
                "with --variant, or move it away and fine-tune anew"
            )

    def _layout(self, plan: Plan, name: str) -> Layout:
        variant = untuned(name)
        dtype = FORMATS[self.form.dtype] if self.form.dtype else None
        if name == variant:
            units = partial(unit_sources, self.checkpoint, self.trained)
            return layout(self.teacher, plan, variant, units, dtype)
        blank = partial(blank_unit, teacher=self.teacher)
        model = layout(self.teacher, plan, variant, blank, dtype)
        return replace(model, tensors=self.tuned(variant).put_into(model.tensors))

    def write(self, plan: Plan, variant: str, out: Path) -> None:
        """Write one variant: its transformer, what is around it, card and checksums."""
        form = self.form
        model = self._layout(plan, variant)
        single = single_file_tensors(model, form.single_file) if form.single_file else None
        kind = (form.single_file or "").partition("-")[2]
        single, metadata = scaled(single, kind) if single and kind else (single, {})
        gguf = gguf_tensors(model, form.single_file or "comfyui") if form.gguf else None
        needed = model.bytes * (1 + bool(single or form.quantize) + bool(gguf))
        # Quantising needs room for the plain weights and, at most, as much again for its own.
        require_space(out, needed + copied_bytes(self.around, out))
        facts = self._facts(plan, variant, model)
        with disk_errors_as_one_line(out), atomic_folder(out) as folder:
            place(self.around, folder)
            transformer = folder / facts.component
            write_model(model, transformer, form.max_shard_size)
            name_transformer(
                folder, self.recipe.teacher.folder, facts.component, facts.own_code or "diffusers", facts.model_class
            )
            if single:
                write_file(single, folder / str(facts.single_file), metadata)
            if gguf:
                write_gguf(*gguf, folder / str(facts.gguf), str(form.gguf))
            if form.quantize:
                facts.quantised = self._quantise(transformer, form.quantize, find_class(facts.model_class))
                add_own_code(transformer)
            (folder / FACTS).write_text(facts.model_dump_json(indent=1) + "\n")
            write_sums(folder)
            write_card(folder, read_figures(self.recipe.run / "report.json"))

    def _facts(self, plan: Plan, variant: str, model: Layout) -> Facts:
        places, chosen = plan.places(untuned(variant)), plan.units_of(untuned(variant))
        tuned = self.tuned(untuned(variant)) if variant != untuned(variant) else None
        path, teacher = self.recipe.teacher.folder, self.teacher
        pipeline_code, pipeline = pipeline_class(path)
        saved = sum(parameters_saved(unit, teacher) for unit in chosen)
        bytes_of: Counter[torch.dtype] = Counter()
        for source in model.tensors.values():
            bytes_of[source.dtype] += source.bytes
        return Facts(
            variant=variant,
            teacher=teacher_name(path),
            **teacher_terms(path),
            model_class=model.config["_class_name"],
            own_code=MODELING if has_own_code(model.config) else None,
            component=teacher.component,
            pipeline_class=pipeline,
            pipeline_code=pipeline_code,
            dtype=str(bytes_of.most_common(1)[0][0]).removeprefix("torch."),
            parameters=model.parameters,
            block_share=1 - saved / teacher.anatomy.block_parameters,
            blocks=len(places),
            teacher_blocks=len(teacher.blocks),
            units=[_unit_facts(unit) for unit in chosen],
            step=tuned.origin.step if tuned else self.checkpoint.contents.step,
            spans=_spans(places, teacher.blocks),
            finetuned=tuned.words if tuned else None,
            single_file=f"{variant}.safetensors" if self.form.single_file else None,
            single_file_for=TOOLS[self.form.single_file] if self.form.single_file else "",
            gguf=f"{variant}-{self.form.gguf}.gguf" if self.form.gguf else None,
        )

    def _quantise(self, folder: Path, method: str, model_class: Any) -> Quantised:
        """Put quantised weights in the place of a folder's plain ones, and measure what that costs."""
        plain = folder.with_name("plain")
        folder.rename(plain)
        recipe = self.recipe
        dtype = FORMATS[self.form.dtype or recipe.teacher.precision]
        quantise.quantise(model_class, plain, folder, method, dtype, self.form.max_shard_size)
        found = quantise.cost(recipe, self.teacher, plain, folder, model_class, method)
        shutil.rmtree(plain)
        return found


def _spans(places: Sequence[tuple[int, UnitPlan | None]], blocks: Sequence[Block]) -> list[list[tuple[int, int]]]:
    """What each block of a variant stands for; see `Facts`."""
    found: dict[str, list[tuple[int, int]]] = {}
    for origin, unit in places:
        last = blocks[unit.span[1] if unit else origin].position
        found.setdefault(blocks[origin].list_name, []).append((blocks[origin].position, last))
    return list(found.values())


def _unit_facts(unit: UnitPlan) -> UnitFacts:
    replaced, by = unit.behaviour.facts(unit)
    return UnitFacts(name=unit.name, replaced=replaced, by=by)


def read_switches(words: Sequence[str]) -> dict[str, bool]:
    """`UNIT=on` and `UNIT=off` as unit -> whether it is to be plugged; of two for one unit the last one counts.

    Raises:
        UserError: a word is neither.
    """
    switches: dict[str, bool] = {}
    for word in words:
        unit, _, state = word.rpartition("=")
        if not unit or state not in ("on", "off"):
            raise UserError(f"--plug: '{word}' is not UNIT=on or UNIT=off")
        switches[unit] = state == "on"
    return switches


def replug(plan: Plan, trained: Plan, variant: str, switches: Mapping[str, bool]) -> Plan:
    """The plan with one variant changed.

    Args:
        trained: the plan that training began with; its units can be plugged even if `plan` has dropped them since.
        switches: unit -> whether the variant is to have it; units not named stay as they are.

    Raises:
        UserError: a unit is not known, or two that are to be plugged get in each other's way.
    """
    known = {unit.name for unit in plan.units}
    library = (*plan.units, *(unit for unit in trained.units if unit.name not in known))
    names = [unit.name for unit in library]
    for unit in switches:
        if unit not in names:
            raise UserError(f"--plug: unit '{unit}' is not in the library; it has: {', '.join(names)}")
    before = {unit.name for unit in plan.units_of(variant)}
    chosen = tuple(name for name in names if switches.get(name, name in before))
    changed = plan.model_copy(update={"units": library, "variants": {variant: chosen}})
    for a, b in combinations(changed.units_of(variant), 2):
        if reason := conflict(a, b):
            raise UserError(f"--plug: {reason}; plug one of them, and turn the other off")
    return changed
