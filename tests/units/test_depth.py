"""Depth units: a fresh one is the teacher's own block, ready to be trained on its own."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from ppcl_ds.teacher.anatomy import Capture
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.depth import depth_unit
from tests.anatomies import anatomy_of
from tests.calls import call_once
from tests.conftest import TEACHERS, make_teacher
from tests.pipelines import OPTIONS

FIRSTS = [("qwen", 0), ("qwen", 4), ("flux", 1), ("flux", 4), ("flux", 7), ("sd3", 0), ("sd3", 3), ("sd3", 5)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    made = {}
    for family in TEACHERS:
        folder = tmp_path_factory.mktemp(family)
        make_teacher(family, folder)
        made[family] = Teacher(folder, options=OPTIONS[family])
    return made


def stock(teacher: Teacher) -> Any:
    return getattr(diffusers, teacher.class_name).from_pretrained(teacher.files.folder).eval()


def block_of(model: Any, index: int) -> torch.nn.Module:
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])][index]


def recorded(model: Any) -> Capture:
    with anatomy_of(model).record(model) as capture:
        call_once(model)
    return capture


@pytest.mark.parametrize(("family", "first"), FIRSTS)
@torch.no_grad()
def test_a_fresh_unit_is_the_teachers_block(teachers: dict[str, Teacher], family: str, first: int) -> None:
    teacher = teachers[family]
    model = stock(teacher)
    block = anatomy_of(model).blocks[first]
    capture = recorded(model)
    unit = depth_unit(teacher, first, torch.float32).eval()
    output = unit(capture.streams[block.entering], capture.conditioning[first])
    assert output.keys() == capture.streams[block.leaving].keys()
    for stream, expected in capture.streams[block.leaving].items():
        assert torch.equal(output[stream], expected)


@pytest.mark.parametrize(("family", "first"), FIRSTS)
def test_its_tensors_are_named_as_in_the_teachers_block(teachers: dict[str, Teacher], family: str, first: int) -> None:
    teacher = teachers[family]
    expected = {f"core.{name}": tensor for name, tensor in block_of(stock(teacher), first).state_dict().items()}
    state = depth_unit(teacher, first, torch.float32).state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_of_a_unit_can_be_trained_in_the_number_format_asked_for(
    teachers: dict[str, Teacher], dtype: torch.dtype
) -> None:
    unit = depth_unit(teachers["sd3"], 0, dtype)
    assert all(parameter.requires_grad and parameter.dtype == dtype for parameter in unit.parameters())


def test_every_parameter_of_a_unit_receives_a_gradient(teachers: dict[str, Teacher]) -> None:
    teacher = teachers["qwen"]
    model = stock(teacher)
    capture = recorded(model)
    unit = depth_unit(teacher, 2, torch.float32)
    output = unit(capture.streams[2], capture.conditioning[2])
    (output["image"].square().sum() + output["text"].square().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in unit.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_one_unit_leaves_other_units_of_the_same_block_alone(teachers: dict[str, Teacher]) -> None:
    teacher = teachers["qwen"]
    trained, other = depth_unit(teacher, 1, torch.float32), depth_unit(teacher, 1, torch.float32)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    expected = block_of(stock(teacher), 1).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.core.state_dict().items())
