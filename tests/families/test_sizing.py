"""What every pipeline's units need is estimated without weights; units are as large as their blocks of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ppcl_ds.estimate.accelerators import ACCELERATORS
from ppcl_ds.estimate.estimate import size
from ppcl_ds.estimate.inputs import read_inputs
from ppcl_ds.recipe import load_recipe
from tests.families.pipelines import PIPELINES
from tests.families.test_call import NOT_SHORTENED, OTHER_LEVELS, REFUSED, UNMAPPED, made, opened, options_of

LEFT_OUT = {*REFUSED, *NOT_SHORTENED, *UNMAPPED, *OTHER_LEVELS, "vace"}
"""Each refused by name where its pipeline is asked; VACE's is told of a clip, which no recipe can name."""
CORE = {"mochi", "flux2", "wan"}
"""The ordinary suite's: one that picks what a mask marks, one of two lists of blocks, one of clips."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in CORE else pytest.mark.families) for n in PIPELINES if n not in LEFT_OUT],
)
def test_a_distillation_is_sized(name: str, tmp_path: Path) -> None:
    family, pipe = made(name)
    _, asked = opened(family, pipe, tmp_path / "teacher")
    recipe = {
        "run": str(tmp_path),
        "data": {"source": "{run}/images", "shards": "{run}/shards", "images": {"size": asked.height}},
        "teacher": {"path": str(tmp_path / "teacher"), "options": options_of(family), "precision": "fp32"},
        "plan": {"variants": {"small": 0.15}},
        "topology": {"stages": 1, "replicas": 1},
        "distill": {"steps": 1, "micro_batch": 1, "micro_batches_per_step": 1, "optimizer": {"lr": 1e-3}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    inputs = read_inputs(load_recipe(tmp_path / "recipe.yaml"), 1, 1, size=asked)
    found = size(inputs, ACCELERATORS["h100"])
    blocks = {unit.name: inputs.teacher.blocks[unit.span[0]] for unit in inputs.plan.units}
    parts = [inputs.teacher.anatomy.module(pipe.transformer, block) for block in blocks.values()]
    assert found.parameters == sum(p.numel() for part in parts for p in part.parameters()) > 0
    assert found.memory.peak > 4 * found.parameters
