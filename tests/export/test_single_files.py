"""`--single-file`: diffusers' own converters turn it back into the very same state dict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from ppcl_ds.errors import UserError
from ppcl_ds.export.consolidate import Form, consolidate
from ppcl_ds.export.single_files import single_file_tensors
from ppcl_ds.recipe import Recipe
from ppcl_ds.units.variant import Layout
from tests.conftest import TEACHERS, command
from tests.export.test_names import CONVERTERS, converter
from tests.export.trained import pretend_trained


def exported(new_run: Callable[..., Path], family: str) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """A run whose variant `small` was exported with a single file, and what the transformer folder holds."""
    recipe = pretend_trained(new_run(family), family)
    consolidate(recipe, ["small"], Form(single_file="comfyui"))
    model = getattr(diffusers, TEACHERS[family][0]).from_pretrained(recipe.pruned("small"))
    return recipe, dict(model.state_dict())


def test_flux_converts_back_to_the_same_tensors(new_run: Callable[..., Path]) -> None:
    recipe, expected = exported(new_run, "flux")
    file = load_file(recipe.run / "pruned" / "small" / "small.safetensors")
    assert "double_blocks.0.img_attn.qkv.weight" in file  # by this name ComfyUI knows the family
    found = converter(*CONVERTERS["flux"])(dict(file))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_qwen_image_keeps_diffusers_names(new_run: Callable[..., Path]) -> None:
    recipe, expected = exported(new_run, "qwen")
    file = recipe.run / "pruned" / "small" / "small.safetensors"
    torch.testing.assert_close(load_file(file), expected, rtol=0, atol=0)
    model = diffusers.QwenImageTransformer2DModel.from_single_file(
        str(file), config=str(recipe.pruned("small").parent), subfolder="transformer", local_files_only=True
    )
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)


def test_sd3_is_for_the_tool_that_counts(new_run: Callable[..., Path]) -> None:
    recipe = pretend_trained(new_run("sd3"), "sd3")
    with pytest.raises(UserError, match=r"num_layers .* for num_attention_heads; this one has 3"):
        consolidate(recipe, ["small"], Form(single_file="comfyui"))
    assert not list((recipe.run / "pruned").glob("*"))
    consolidate(recipe, ["small"], Form(single_file="sd.cpp"))
    file = load_file(recipe.run / "pruned" / "small" / "small.safetensors")
    model = diffusers.SD3Transformer2DModel.from_pretrained(recipe.pruned("small"))
    found = converter(*CONVERTERS["sd3"])(dict(file))
    torch.testing.assert_close(found, dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "AllegroTransformer3DModel"}, "AllegroTransformer3DModel is not known here"),
        (
            {"_class_name": "PrunedFluxTransformer2DModel"},
            "whole blocks, and a PrunedFluxTransformer2DModel lacks parts",
        ),
        ({"_class_name": "MochiTransformer3DModel", "num_layers": 40}, "ComfyUI does not count num_layers .* for 48"),
        ({"_class_name": "LTXVideoTransformer3DModel"}, "stable-diffusion.cpp has no LTXVideoTransformer3DModel"),
        ({"_class_name": "HiDreamImageTransformer2DModel", "num_layers": 9}, "for 16; this one has 9"),
        (
            {"_class_name": "WanTransformer3DModel", "num_layers": 29},
            "stable-diffusion.cpp .* for 30 or 40; this one has",
        ),
        (
            {"_class_name": "Flux2Transformer2DModel", "num_layers": 8, "num_single_layers": 40},
            "stable-diffusion.cpp does not count num_single_layers .* for 48; this one has 40",
        ),
        (
            {"_class_name": "Flux2Transformer2DModel", "num_single_layers": 40, "guidance_embeds": True},
            "stable-diffusion.cpp does not count num_single_layers .* for 48; this one has 40",
        ),
    ],
)
def test_a_model_that_the_tool_would_not_load_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        single_file_tensors(Layout(config, {}, 0), "sd.cpp" if "stable-diffusion.cpp" in message else "comfyui")


@pytest.mark.parametrize(("blocks", "guidance"), [(20, False), (48, True)])
def test_flux2_is_written_where_its_last_block_says_which_it_is(blocks: int, guidance: bool) -> None:
    """stable-diffusion.cpp tells dev from klein by the last of dev's blocks, so klein may have any number of them."""
    config = {"_class_name": "Flux2Transformer2DModel", "num_single_layers": blocks, "guidance_embeds": guidance}
    assert single_file_tensors(Layout(config, {}, 0), "sd.cpp") == {}


def test_an_unknown_tool_is_refused(new_run: Callable[..., Path]) -> None:
    printed = command("consolidate", new_run("qwen"), "--single-file", "webui", code=2)
    assert "--single-file: 'webui' is not one of comfyui, comfyui-fp8, comfyui-int8, sd.cpp" in printed
