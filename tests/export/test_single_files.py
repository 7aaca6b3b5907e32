"""The single file for ComfyUI: diffusers' own converters turn it back into the very same state dict."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

from ppcl_ds.errors import UserError
from ppcl_ds.export.consolidate import Form, consolidate
from ppcl_ds.export.single_files import single_file_tensors
from ppcl_ds.recipe import Recipe
from ppcl_ds.units.variant import Layout
from tests.conftest import TEACHERS
from tests.export.trained import pretend_trained


def exported(new_run: Callable[..., Path], family: str) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """A run whose variant `small` was exported with a single file, and what the transformer folder holds."""
    recipe = pretend_trained(new_run(family), family)
    consolidate(recipe, ["small"], Form(single_file=True))
    model = getattr(diffusers, TEACHERS[family][0]).from_pretrained(recipe.pruned("small"))
    return recipe, dict(model.state_dict())


def flux_converter(width: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """diffusers' converter, which has FLUX.1's width written into it, for a narrower model."""
    name = "convert_flux_transformer_checkpoint_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name))
    assert source.count("inner_dim = 3072") == 1
    scope: dict[str, Any] = {"torch": torch}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), scope)
    return scope[name]


def test_flux_converts_back_to_the_same_tensors(new_run: Callable[..., Path]) -> None:
    recipe, expected = exported(new_run, "flux")
    file = load_file(recipe.run / "pruned" / "small" / "small.safetensors")
    assert "double_blocks.0.img_attn.qkv.weight" in file  # by this name ComfyUI knows the family
    found = flux_converter(32)(dict(file))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_qwen_image_keeps_diffusers_names(new_run: Callable[..., Path]) -> None:
    recipe, expected = exported(new_run, "qwen")
    file = recipe.run / "pruned" / "small" / "small.safetensors"
    torch.testing.assert_close(load_file(file), expected, rtol=0, atol=0)
    model = diffusers.QwenImageTransformer2DModel.from_single_file(
        str(file), config=str(recipe.pruned("small").parent), subfolder="transformer", local_files_only=True
    )
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)


def test_sd3_is_refused_because_comfyui_takes_its_depth_from_its_width(new_run: Callable[..., Path]) -> None:
    recipe = pretend_trained(new_run("sd3"), "sd3")
    with pytest.raises(UserError, match="takes the number of SD3's blocks from its width"):
        consolidate(recipe, ["small"], Form(single_file=True))
    assert not list((recipe.run / "pruned").glob("*"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "WanTransformer3DModel"}, "WanTransformer3DModel is not known here"),
        ({"_class_name": "QwenImageTransformer2DModel", "zero_cond_t": True}, "zero_cond_t"),
    ],
)
def test_a_model_that_the_file_cannot_describe_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        single_file_tensors(Layout(config, {}, 0))
