"""A teacher on disk: any range of any tensor comes back exactly, and a broken folder is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.files import ModelFiles
from tests.conftest import TEACHERS


@pytest.fixture(scope="module")
def teacher() -> Any:
    class_name, config = TEACHERS["sd3"]
    torch.manual_seed(0)
    return getattr(diffusers, class_name)(**config | {"num_layers": 2, "dual_attention_layers": [0]})


@pytest.fixture(scope="module")
def folders(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same teacher as one file, in many files, and inside a pipeline folder."""
    made = {layout: tmp_path_factory.mktemp(layout) for layout in ("single", "sharded", "pipeline")}
    teacher.save_pretrained(made["single"])
    teacher.save_pretrained(made["sharded"], max_shard_size="20KB")
    teacher.save_pretrained(made["pipeline"] / "transformer", max_shard_size="20KB")
    (made["pipeline"] / "model_index.json").write_text("{}")
    return made


LAYOUTS = ["single", "sharded", "pipeline"]


def test_the_sharded_folder_really_is_sharded(folders: dict[str, Path]) -> None:
    assert len(list(folders["sharded"].glob("*.safetensors"))) > 3
    assert len(list(folders["single"].glob("*.safetensors"))) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_that_of_the_stock_model(teacher: Any, folders: dict[str, Path], layout: str) -> None:
    files = ModelFiles(folders[layout])
    expected: dict[str, Tensor] = teacher.state_dict()
    assert files.class_name == "SD3Transformer2DModel"
    assert files.keys == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(files.tensor(key), tensor), key


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flat_range_is_a_slice_of_the_flattened_tensor(
    teacher: Any, folders: dict[str, Path], layout: str, data: st.DataObject
) -> None:
    state: dict[str, Tensor] = teacher.state_dict()
    key = data.draw(st.sampled_from(sorted(state)))
    flat = state[key].flatten()
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert torch.equal(ModelFiles(folders[layout]).flat_range(key, start, stop), flat[start:stop])


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 5), max_size=4), data=st.data())
def test_a_flat_range_can_be_read_from_a_tensor_of_any_shape(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, shape: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shapes")
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.bfloat16).reshape(shape)
    save_file({"it": tensor}, folder / SAFETENSORS_WEIGHTS_NAME)
    shutil.copy(folders["single"] / "config.json", folder)
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    assert torch.equal(ModelFiles(folder).flat_range("it", start, stop), tensor.flatten()[start:stop])


def test_an_empty_model_has_every_shape_and_no_weights(teacher: Any, folders: dict[str, Path]) -> None:
    model = ModelFiles(folders["single"]).empty_model()
    assert type(model) is type(teacher)
    assert {k: p.shape for k, p in model.named_parameters()} == {k: p.shape for k, p in teacher.named_parameters()}
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())
    for name, buffer in teacher.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


def broken(folders: dict[str, Path], tmp_path: Path, layout: str) -> Path:
    """A copy to break, in a folder with a telling name."""
    return shutil.copytree(folders[layout], tmp_path / "my teacher")


def problem(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        ModelFiles(folder)
    message = str(refused.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("number", [0, -1])
def test_a_missing_weights_file_is_named(folders: dict[str, Path], tmp_path: Path, number: int) -> None:
    folder = broken(folders, tmp_path, "sharded")
    gone = sorted(folder.glob("*.safetensors"))[number]
    gone.unlink()
    assert gone.name in problem(folder)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_folder_without_weights_or_index_is_named(folders: dict[str, Path], tmp_path: Path, layout: str) -> None:
    folder = broken(folders, tmp_path, layout)
    (folder / (SAFE_WEIGHTS_INDEX_NAME if layout == "sharded" else SAFETENSORS_WEIGHTS_NAME)).unlink()
    assert SAFETENSORS_WEIGHTS_NAME in problem(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": []}'])
def test_a_damaged_index_is_a_fault_of_the_folder(folders: dict[str, Path], tmp_path: Path, content: str) -> None:
    folder = broken(folders, tmp_path, "sharded")
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(content)
    problem(folder)


def test_a_damaged_weights_file_is_a_fault_of_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = broken(folders, tmp_path, "single")
    (folder / SAFETENSORS_WEIGHTS_NAME).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    problem(folder)


@pytest.mark.parametrize("name", ["NoSuchTransformer", "FlowMatchEulerDiscreteScheduler", ""])
def test_a_class_that_is_no_diffusers_model_is_named(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = broken(folders, tmp_path, "single")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": name}))
    assert f"'{name}'" in problem(folder)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_without_a_readable_configuration_is_named(
    folders: dict[str, Path], tmp_path: Path, content: str | None
) -> None:
    folder = broken(folders, tmp_path, "single")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert "config.json" in problem(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    problem(tmp_path / "nowhere")
