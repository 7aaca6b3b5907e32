"""Depth units: a fresh one is the teacher's own block, ready to be trained on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ppcl_ds.data.batch import Prompts
from ppcl_ds.teacher.anatomy import Anatomy, Capture
from ppcl_ds.teacher.call import caller_for
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.depth import depth_unit
from tests.conftest import TEACHERS, make_teacher

FIRSTS = [("qwen", 0), ("qwen", 4), ("flux", 1), ("flux", 4), ("flux", 7), ("sd3", 0), ("sd3", 3), ("sd3", 5)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in TEACHERS}
    for family, folder in made.items():
        make_teacher(family, folder)
    return made


def stock(teacher: Teacher) -> Any:
    return getattr(diffusers, teacher.class_name).from_pretrained(teacher.files.folder).eval()


def block_of(model: Any, index: int) -> torch.nn.Module:
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])][index]


@torch.no_grad()
def recorded(model: Any) -> Capture:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 1, 8, 8, generator=generator)
    embeds, pooled = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 8, generator=generator)
    prompts = Prompts(embeds, torch.ones(2, 5, dtype=torch.bool), pooled)
    with Anatomy(model).record(model) as capture:
        caller_for(type(model).__name__)(model, latents, prompts, torch.tensor([0.3, 0.8]))
    return capture


@pytest.mark.parametrize(("family", "first"), FIRSTS)
@torch.no_grad()
def test_a_fresh_unit_is_the_teachers_block(folders: dict[str, Path], family: str, first: int) -> None:
    teacher = Teacher(folders[family])
    model = stock(teacher)
    block = Anatomy(model).blocks[first]
    capture = recorded(model)
    unit = depth_unit(teacher, first, torch.float32).eval()
    output = unit(capture.streams[block.entering], capture.conditioning[first])
    assert output.keys() == capture.streams[block.leaving].keys()
    for stream, expected in capture.streams[block.leaving].items():
        assert torch.equal(output[stream], expected)


@pytest.mark.parametrize(("family", "first"), FIRSTS)
def test_its_tensors_are_named_as_in_the_teachers_block(folders: dict[str, Path], family: str, first: int) -> None:
    teacher = Teacher(folders[family])
    expected = {f"core.{name}": tensor for name, tensor in block_of(stock(teacher), first).state_dict().items()}
    state = depth_unit(teacher, first, torch.float32).state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_of_a_unit_can_be_trained_in_the_number_format_asked_for(
    folders: dict[str, Path], dtype: torch.dtype
) -> None:
    unit = depth_unit(Teacher(folders["sd3"]), 0, dtype)
    assert all(parameter.requires_grad and parameter.dtype == dtype for parameter in unit.parameters())


def test_every_parameter_of_a_unit_receives_a_gradient(folders: dict[str, Path]) -> None:
    teacher = Teacher(folders["qwen"])
    model = stock(teacher)
    capture = recorded(model)
    unit = depth_unit(teacher, 2, torch.float32)
    output = unit(capture.streams[2], capture.conditioning[2])
    (output["image"].square().sum() + output["text"].square().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in unit.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_one_unit_leaves_other_units_of_the_same_block_alone(folders: dict[str, Path]) -> None:
    teacher = Teacher(folders["qwen"])
    trained, other = depth_unit(teacher, 1, torch.float32), depth_unit(teacher, 1, torch.float32)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    expected = block_of(stock(teacher), 1).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.core.state_dict().items())
