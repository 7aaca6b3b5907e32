"""The model card of an exported variant: `README.md`, made from what consolidation knew and evaluation measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from pydantic import BaseModel, ValidationError

from ppcl_ds.atomic import atomic_write
from ppcl_ds.early import UNDISTILLED, untuned
from ppcl_ds.errors import UserError, brief
from ppcl_ds.export.model_folder import CARD, FACTS, weights_digest
from ppcl_ds.pages import render

TERMS = ("license", "license_name", "license_link", "pipeline_tag")
"""What a variant's card takes over from the teacher's."""


REPORTED = (
    "The paper's own models of Qwen-Image lose 0.4 % with 14 B parameters, 3.0 % with 12 B, and 3.3 % with 10 B after "
    "fine-tuning, as the mean over its benchmarks (arXiv 2511.16156)."
)


class UnitFacts(BaseModel):
    """A unit that the variant plugs: what it replaced, and by what, in words."""

    name: str
    replaced: str
    by: str


class Quantised(BaseModel):
    """How the weights were quantised, and what that cost.

    Attributes:
        method: `int8`, `fp8` or `nf4`.
        package: what a reader of the weights has to install.
        velocity_mse: mean squared difference from the unquantised variant's velocity, on held-out data.
        velocity_power: mean square of the unquantised variant's velocity on the same data.
        drawn_mse: the same difference of latents drawn from the same noise in `draw_steps` steps; None where the
            pipeline draws with other transformers, too.
        drawn_power: mean square of the unquantised variant's latents.
    """

    method: str
    package: str
    velocity_mse: float
    velocity_power: float
    drawn_mse: float | None = None
    drawn_power: float | None = None
    draw_steps: int = 0


class Facts(BaseModel):
    """What consolidation knows of a variant.

    Attributes:
        teacher: where the teacher came from, a path or the name of a repository.
        license, license_name, license_link, pipeline_tag: the teacher's, where its folder says so.
        model_class: class of the transformer.
        own_code: the module in the transformer's folder that has the class, where diffusers does not have it.
        component: the transformer, as the pipeline calls it.
        pipeline_class: class of the whole pipeline.
        pipeline_code: the module in the folder that has it, where diffusers does not have it.
        dtype: of most weights before quantising.
        block_share: parameters in the blocks over those in the teacher's.
        blocks, teacher_blocks: number of blocks.
        step: training steps of the units.
        spans: for each list of blocks, in execution order, and each block of the variant: the first and the last of the
            teacher's blocks that it stands for.
        finetuned: what was trained end to end after that, and how, in a sentence or two; None: nothing.
        single_file: name of the file for another tool, where there is one.
        single_file_for: the tool, and how the file is quantised.
        gguf: name of the GGUF file, where there is one.
    """

    variant: str
    teacher: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    pipeline_tag: str | None = None
    model_class: str
    own_code: str | None = None
    component: str = "transformer"
    pipeline_class: str
    pipeline_code: str | None = None
    dtype: str
    parameters: int
    block_share: float
    blocks: int
    teacher_blocks: int
    units: Sequence[UnitFacts]
    step: int
    spans: list[list[tuple[int, int]]] = []
    finetuned: str | None = None
    single_file: str | None
    single_file_for: str = "ComfyUI"
    gguf: str | None = None
    quantised: Quantised | None = None

    @property
    def restricted(self) -> bool:
        """Whether the teacher's licence seems to forbid commercial use, or use outside research."""
        words = f"{self.license} {self.license_name} {self.license_link}"
        return re.search(r"non-?commercial|research|\bnc\b|community", words, re.IGNORECASE) is not None


def reported(model_class: str, teacher_blocks: int) -> str:
    """What the method's authors say of their own models of a teacher, in a sentence; empty where they say nothing."""
    of_qwen_image = model_class.endswith("QwenImageTransformer2DModel") and teacher_blocks == 60
    return REPORTED if of_qwen_image else ""


def write_card(folder: Path, figures: Sequence[Mapping[str, Any]], sets: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the card of a variant's folder, which must hold `variant.json`; a folder without it is left alone.

    Args:
        figures: rows of `report.json`; used if they were measured on the very weights that the folder holds.
        sets: its prompt sets, likewise.
    """
    if not (folder / FACTS).exists():
        return
    facts = read_facts(folder)
    rows = {str(row.get("name")): row for row in figures}
    measured = rows.get(facts.variant, {})
    current = measured.get("weights") is not None and measured["weights"] == weights_digest(folder)
    variant = untuned(facts.variant)
    names = dict.fromkeys(("teacher", facts.variant, variant, variant + UNDISTILLED))
    card = render(
        "ppcl_ds.export",
        "card.md.jinja",
        facts=facts,
        front=yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True),
        figures=[rows[name] for name in names if name in rows] if current else [],
        sets=[each for each in sets if current and any(facts.variant in s["values"] for s in each["scores"])],
        shown=[name for name in names if name in rows],
        reported=reported(facts.model_class, facts.teacher_blocks),
    )
    atomic_write(folder / CARD, card)


def read_facts(folder: Path) -> Facts:
    """What consolidation wrote of a variant into its folder.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Facts.model_validate_json((folder / FACTS).read_bytes())
    except (OSError, ValidationError) as fault:
        raise UserError(f"{folder / FACTS} cannot be read ({brief(fault)}); consolidate again") from None


def _front_matter(facts: Facts) -> dict[str, Any]:
    tags = ["ppcl", "pruned", "diffusion-transformer", *([facts.quantised.method] if facts.quantised else [])]
    found: dict[str, Any] = {}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", facts.teacher):  # a path would be no model to the hub
        found["base_model"] = facts.teacher
        found["base_model_relation"] = "quantized" if facts.quantised else "finetune"
    found |= {key: value for key in TERMS if (value := getattr(facts, key))}
    return found | {"library_name": "diffusers", "tags": tags}


def read_figures(report: Path) -> list[dict[str, Any]]:
    """The rows of a `report.json`; none where there is no readable one."""
    try:
        return [dict(row) for row in json.loads(report.read_text())["models"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def teacher_name(path: Path) -> str:
    """The teacher's repository, where the path leads into a download cache; else the path."""
    cached = [part for part in path.parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else str(path)


def teacher_terms(path: Path) -> dict[str, Any]:
    """What the front matter of the teacher's own card says under the names of `TERMS`."""
    try:
        found = metadata_load(path / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: found[key] for key in TERMS if isinstance(found.get(key), str)}
