"""The model card of an exported variant: `README.md`, made from what consolidation knew and evaluation measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from pydantic import BaseModel, ValidationError

from ppcl_ds.atomic import atomic_write
from ppcl_ds.errors import UserError, brief
from ppcl_ds.export.model_folder import CARD, weights_digest
from ppcl_ds.pages import render
from ppcl_ds.units.plan import UNDISTILLED, untuned

FACTS = "variant.json"
"""Beside the card: the facts it was made from. It also marks a folder as one that `ppcl consolidate` may replace."""


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
    """

    method: str
    package: str
    velocity_mse: float
    velocity_power: float


class Facts(BaseModel):
    """What consolidation knows of a variant.

    Attributes:
        teacher: where the teacher came from, a path or the name of a repository.
        license: the teacher's, where its folder says so.
        model_class: class of the transformer.
        own_code: the module in the transformer's folder that has the class, where diffusers does not have it.
        pipeline_class: class of the whole pipeline, where the folder is one.
        dtype: of most weights before quantising.
        block_share: parameters in the blocks over those in the teacher's.
        blocks, teacher_blocks: number of blocks.
        step: training steps of the units.
        finetuned: what was trained end to end after that, and how, in a sentence or two; None: nothing.
        single_file: name of the file for ComfyUI, where there is one.
    """

    variant: str
    teacher: str
    license: str | None
    model_class: str
    own_code: str | None = None
    pipeline_class: str | None
    dtype: str
    parameters: int
    block_share: float
    blocks: int
    teacher_blocks: int
    units: Sequence[UnitFacts]
    step: int
    finetuned: str | None = None
    single_file: str | None
    quantised: Quantised | None = None


def write_card(folder: Path, figures: Sequence[Mapping[str, Any]]) -> None:
    """Write the card of a variant's folder, which must hold `variant.json`; a folder without it is left alone.

    Args:
        figures: rows of `report.json`; used if they were measured on the very weights that the folder holds.
    """
    try:
        facts = Facts.model_validate_json((folder / FACTS).read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValidationError) as fault:
        raise UserError(f"{folder / FACTS} cannot be read ({brief(fault)}); consolidate again") from None
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
    )
    atomic_write(folder / CARD, card)


def _front_matter(facts: Facts) -> dict[str, Any]:
    tags = ["ppcl", "pruned", "diffusion-transformer", *([facts.quantised.method] if facts.quantised else [])]
    known = {"license": facts.license} if facts.license else {}
    return {"base_model": facts.teacher, **known, "library_name": "diffusers", "tags": tags}


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


def teacher_license(path: Path) -> str | None:
    """The licence in the front matter of the teacher's own card, if it has one."""
    try:
        found = (metadata_load(path / CARD) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None
