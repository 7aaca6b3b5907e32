"""`recipes/small_machines.yaml` fits on the machines that it names, as it stands and with each of its blocks.

That the estimate is right of such runs is seen in `tests/pretend/test_published.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ppcl_ds.estimate.accelerators import accelerator_called
from ppcl_ds.estimate.estimate import size
from ppcl_ds.estimate.inputs import read_inputs
from ppcl_ds.estimate.numbers import Estimate
from ppcl_ds.recipe import load_recipe
from ppcl_ds.shipped import shipped
from tests.pretend.cases import Case, write_teacher

STANDS, *BLOCKS = shipped("recipes/small_machines.yaml").read_text().split("# === ")
CARDS = {"80 GB": "h100", "48 GB": "l40s", "24 GB": "rtx4090"}
TITLES = ["Qwen-Image, 10 units, one GPU of 80 GB", *(block.splitlines()[0] for block in BLOCKS)]


def recipe_of(number: int, **changes: Any) -> dict[str, Any]:
    """The recipe with a block's lines in the place of those that it has."""
    raw = yaml.safe_load(STANDS)
    if number:
        lines = BLOCKS[number - 1].splitlines()[1:]
        raw |= yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines))
    return raw | changes


def sized(raw: dict[str, Any], card: str, folder: Path) -> Estimate:
    """With the published teacher, whose latents are 128 x 128 at 1,024 pixels; here a pixel is a latent."""
    family: Literal["flux", "qwen"] = "flux" if "FLUX" in raw["teacher"]["path"] else "qwen"
    write_teacher(folder / "teacher", family, Case(family=family, blocks=0).config)
    raw["teacher"]["path"], raw["data"]["images"], raw["run"] = str(folder / "teacher"), {"size": 128}, str(folder)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    recipe = load_recipe(path)
    return size(read_inputs(recipe, 1, recipe.topology.world), accelerator_called(card))


@pytest.mark.parametrize("number", range(len(TITLES)), ids=TITLES)
def test_a_machine_holds_what_the_recipe_says(number: int, tmp_path: Path) -> None:
    title, raw = TITLES[number], recipe_of(number)
    card = next(name for memory, name in CARDS.items() if memory in title)
    found = sized(raw, card, tmp_path)
    assert found.fits
    assert f"{sum(len(stage.layers) for stage in found.stages)} units" in title
    assert ("two GPUs" in title) == (found.cluster.world == 2)
    assert found.probing is not None
    resident = sum(size for part, size in found.memory.resident.items() if part.startswith("teacher"))
    probing = (
        resident + found.probing.sums + found.probing.boundaries + sum(found.memory.phases["teacher forward"].values())
    )
    assert probing <= accelerator_called(card).usable_bytes
    assert ("the teacher in CPU memory" in title) == ("teacher partition" in found.memory.host)


def test_what_lies_in_cpu_memory_would_not_fit(tmp_path: Path) -> None:
    """Neither the optimizer on 80 GB, nor the teacher on 48."""
    raw = recipe_of(0)
    raw["distill"]["optimizer"]["offload"] = False
    assert not sized(raw, "h100", tmp_path).fits
    raw = recipe_of(TITLES.index(next(title for title in TITLES if "48 GB" in title)))
    del raw["teacher"]["offload"]
    assert not sized(raw, "l40s", tmp_path).fits
