"""A teacher that is not what it seems is named before any work, by every command that would read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppcl_ds.errors import UserError
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.teacher import open_teacher
from tests.conftest import command

KEY = "transformer_blocks.3.attn.to_q.weight"
Tensors = dict[str, Tensor]


def scaled(tensors: Tensors, scale_name: str) -> None:
    """ComfyUI's fp8: a scale beside each matrix."""
    for name in [name for name, tensor in tensors.items() if tensor.dim() == 2]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", scale_name)] = scale


def in_four_bits(tensors: Tensors) -> None:
    """bitsandbytes': packed into bytes, with what unpacks them beside."""
    tensors[f"{KEY}.absmax"] = torch.ones(4)
    tensors[KEY] = torch.zeros(512, 1, dtype=torch.uint8)


def of_a_taller_model(tensors: Tensors) -> None:
    tensors |= {
        name.replace("blocks.5", "blocks.6"): tensor.clone() for name, tensor in tensors.items() if "blocks.5" in name
    }


def of_a_shorter_model(tensors: Tensors) -> None:
    for name in [name for name in tensors if "blocks.5" in name]:
        del tensors[name]


def of_a_wider_model(tensors: Tensors) -> None:
    tensors[KEY] = torch.zeros(64, 32)


def with_what_nobody_reads(tensors: Tensors) -> None:
    tensors["ema_decay"] = torch.ones(1)


TENSORS: list[tuple[Callable[[Tensors], None], list[str]]] = [
    (lambda tensors: scaled(tensors, ".scale_weight"), ["quantised", ".scale_weight", "made from"]),
    (lambda tensors: scaled(tensors, ".weight_scale"), ["quantised", ".weight_scale", "made from"]),
    (in_four_bits, ["quantised", f"{KEY}.absmax"]),
    (of_a_taller_model, ["nothing", "QwenImageTransformer2DModel", "transformer_blocks.6."]),
    (of_a_shorter_model, ["transformer_blocks.5.", "missing"]),
    (of_a_wider_model, [KEY, "64 x 32", "32 x 32"]),
    (with_what_nobody_reads, ["ema_decay", "nothing"]),
]


@pytest.fixture
def path(new_run: Callable[..., Path]) -> Path:
    return new_run("qwen")


@pytest.fixture
def folder(path: Path) -> Path:
    return load_recipe(path).teacher.path / "transformer"


def change(folder: Path, what: Callable[[Tensors], None]) -> None:
    """Another file in place of the weights; they may be shared with other tests, so nothing is written into."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    tensors = load_file(file)
    what(tensors)
    file.unlink()
    save_file(tensors, file)


def refused(path: Path, folder: Path) -> str:
    with pytest.raises(UserError) as fault:
        open_teacher(load_recipe(path))
    message = str(fault.value)
    assert str(folder) in message
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(("what", "words"), TENSORS)
def test_tensors_of_something_else_are_named(
    path: Path, folder: Path, what: Callable[[Tensors], None], words: list[str]
) -> None:
    change(folder, what)
    message = refused(path, folder)
    assert [word for word in words if word not in message] == []


def test_a_configuration_that_says_quantised_is_believed(path: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    assert "quantised" in refused(path, folder)


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model-ema.safetensors"]
)
def test_a_variant_is_named(path: Path, folder: Path, name: str) -> None:
    (folder / SAFETENSORS_WEIGHTS_NAME).rename(folder / name)
    message = refused(path, folder)
    assert name in message
    assert "variant" in message


@pytest.mark.parametrize("wrong", ["made_up", "transformer_blocks.0.attn.to_q.weight"])
def test_an_index_is_held_against_its_files(path: Path, folder: Path, wrong: str) -> None:
    """Names that no file has, and names that another file has."""
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    (folder / SAFETENSORS_WEIGHTS_NAME).unlink()
    halves = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    files = {key: name for name, keys in halves.items() for key in keys}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"weight_map": files}))
    open_teacher(load_recipe(path))
    other = {"a.safetensors": "b.safetensors"}.get(files.get(wrong, ""), "a.safetensors")
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"weight_map": files | {wrong: other}}))
    message = refused(path, folder)
    assert wrong in message
    assert other in message


def test_a_single_file_in_place_of_the_folder_is_named(path: Path, folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    recipe = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"path": file})})
    with pytest.raises(UserError, match="ppcl import"):
        open_teacher(recipe)


def test_every_command_says_so_before_it_works(path: Path, folder: Path) -> None:
    change(folder, of_a_taller_model)
    plan = load_recipe(path).plan_file
    for step in ("probe", "plan", "distill"):
        if step == "distill":  # which asks first whether there is a plan
            plan.write_text("of an earlier teacher\n")
        assert "transformer_blocks.6." in command(step, path, code=2)
    assert not load_recipe(path).probe_folder.exists()


@pytest.mark.parametrize(
    ("key", "value"), [(KEY, torch.nan), ("proj_out.bias", -torch.inf), ("img_in.weight", torch.inf)]
)
def test_a_number_that_is_not_finite_is_found_by_the_rank_that_reads_it(
    path: Path, folder: Path, key: str, value: float
) -> None:
    def break_it(tensors: Tensors) -> None:
        tensors[key].view(-1)[-1] = value

    change(folder, break_it)
    printed = command("probe", path, code=2)
    [line] = [line for line in printed.splitlines() if "error: " in line]
    assert key in line
    assert "NaN or infinite" in line
    assert "Traceback" not in printed
