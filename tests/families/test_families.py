"""Every family's tiny teacher: its blocks, as plain hooks see them, and the shorter models of its stock class."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.files import find_class
from ppcl_ds.teacher.surgery import lay_out
from ppcl_ds.teacher.teacher import Teacher
from tests.families.core import cases
from tests.families.teachers import TEACHERS, build

REFUSED = {
    "anyflow_far": "cannot be run without its weights",  # flex attention
    "kandinsky6_sr": "cannot be run without its weights",
    "latte": "no list of blocks",  # two lists run by turns
}
"""Families none of whose blocks can be reached -> why, as the message says."""


def call(inputs: dict[str, Any], model: Any) -> Any:
    return model(**copy.deepcopy(inputs), return_dict=False)


def outputs(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(call(inputs, model)) if isinstance(leaf, Tensor)]


def opened(name: str, folder: Path) -> tuple[nn.Module, dict[str, Any], Teacher]:
    model: Any
    model, inputs = build(name)
    model.save_pretrained(folder)
    return model, inputs, Teacher(folder, run=partial(call, inputs))


@pytest.mark.parametrize("name", cases(TEACHERS))
def test_a_family(name: str, tmp_path: Path) -> None:
    model, inputs, teacher = opened(name, tmp_path)
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            _ = teacher.anatomy
        return
    replays(model, inputs, teacher)
    shortens(model, inputs, teacher)


def replays(model: nn.Module, inputs: dict[str, Any], teacher: Teacher) -> None:
    """Taps leave the output alone; a copy of each block called on what was recorded gives the next boundary."""
    before = outputs(model, inputs)
    with teacher.anatomy.record(model) as capture:
        during = outputs(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    for block in teacher.blocks:
        twin = copy.deepcopy(teacher.anatomy.module(model, block))
        with torch.no_grad():
            left = block.call(twin, capture.streams[block.entering], capture.conditioning[block.index])
        for stream, tensor in capture.streams[block.leaving].items():
            assert torch.equal(left[stream], tensor), f"{block.key}: {stream}"
        if not block.closes:
            assert block.leaving == teacher.blocks[block.index + 1].entering


def shortens(model: nn.Module, inputs: dict[str, Any], teacher: Teacher) -> None:
    """Without the members of a span, the stock class computes what the teacher does with them bypassed, or refuses."""
    served = 0
    for run in teacher.anatomy.runs:
        for first, last in sorted({(0, 1), (0, 2), (len(run) - 2, len(run) - 1), (len(run) - 3, len(run) - 2)}):
            if not 0 <= first < last < len(run) or (run[first].index, run[last].index) not in teacher.allowed_spans:
                continue
            removed = range(run[first].index + 1, run[last].index + 1)
            places = [(block.index, None) for block in teacher.blocks if block.index not in removed]
            try:
                config, sources = lay_out(teacher, places)
            except UserError as fault:
                print(f"REFUSED {teacher.class_name} {list(removed)}: {str(fault).partition(': ')[2]}")
                continue
            smaller = find_class(config["_class_name"]).from_config(config).eval()
            smaller.load_state_dict({name: source.load() for name, source in sources.items()})
            with teacher.anatomy.bypassed(model, removed):
                expected = outputs(model, inputs)
            for own, other in zip(outputs(smaller, inputs), expected, strict=True):
                assert float((own - other).abs().max()) <= 1e-5 * max(1e-6, float(other.abs().max()))
            served += 1
    print(f"SERVED {teacher.class_name} {served}")
