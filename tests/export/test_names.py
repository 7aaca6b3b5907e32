"""Single files of every family in the table: diffusers' own converters turn them back, and so do we."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

from ppcl_ds.errors import UserError
from ppcl_ds.export.names import FILE, from_file, load_names, to_file
from ppcl_ds.teacher.files import held
from tests.families.teachers import TEACHERS, build
from tests.families.verdicts import with_table

CONVERTERS: dict[str, tuple[str, dict[str, str]]] = {
    "flux": ("convert_flux_transformer_checkpoint_to_diffusers", {"inner_dim = 3072": "inner_dim = 32"}),
    "chroma": ("convert_chroma_transformer_checkpoint_to_diffusers", {"inner_dim = 3072": "inner_dim = 32"}),
    "flux2": ("convert_flux2_transformer_checkpoint_to_diffusers", {}),
    "flux2_klein": ("convert_flux2_transformer_checkpoint_to_diffusers", {}),
    "z_image": ("convert_z_image_transformer_checkpoint_to_diffusers", {}),
    "sd3": ("convert_sd3_transformer_checkpoint_to_diffusers", {}),
    "sd35_medium": ("convert_sd3_transformer_checkpoint_to_diffusers", {}),
    "wan": ("convert_wan_transformer_to_diffusers", {}),
    "wan_i2v": ("convert_wan_transformer_to_diffusers", {}),
    "wan22_ti2v": ("convert_wan_transformer_to_diffusers", {}),
    "ltx": ("convert_ltx_transformer_checkpoint_to_diffusers", {}),
    "krea2": ("convert_krea2_transformer_checkpoint_to_diffusers", {}),
}
"""Tiny teacher -> diffusers' converter of its files, and the published widths in it -> those of the teacher."""
FAMILIES = [*CONVERTERS, "qwen_image", "qwen_image_edit_2511", "qwen_image_layered", "hunyuan_video_15"]


def converter(name: str, changes: Mapping[str, str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """One of diffusers' own, for a narrower model."""
    source = inspect.getsource(getattr(single_file_utils, name))
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    scope: dict[str, Any] = vars(single_file_utils) | {"torch": torch}
    exec(source, scope)
    return scope[name]


def written(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A tiny teacher, and what its single file holds."""
    model: Any = build(name)[0]
    names = load_names()[type(model).__name__]
    return model, {key: source.load() for key, source in to_file(names, model.config, held(model.state_dict())).items()}


@pytest.mark.parametrize("name", [name for name in CONVERTERS if name in TEACHERS])
def test_diffusers_own_converter_turns_the_file_back(name: str) -> None:
    model, file = written(name)
    convert = converter(*CONVERTERS[name])
    torch.testing.assert_close(convert(dict(file)), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name in TEACHERS])
def test_we_turn_the_file_back(name: str, prefix: str) -> None:
    model, file = written(name)
    back = from_file(
        load_names()[type(model).__name__],
        model.state_dict(),
        held({prefix + key: tensor for key, tensor in file.items()}),
    )
    assert all(source.load().shape == source.shape for source in back.values())
    torch.testing.assert_close(
        {key: source.load() for key, source in back.items()}, dict(model.state_dict()), rtol=0, atol=0
    )


def test_every_family_of_the_table_is_one_of_diffusers() -> None:
    """And no two tensors share a place."""
    for name, names in load_names().items():
        assert hasattr(diffusers, name) or name == "Krea2Transformer2DModel", FILE
        ours = [each for value in names.names.values() for each in ([value] if isinstance(value, str) else value)]
        assert len(set(ours)) == len(ours), name


def test_an_edit_model_is_marked_as_one() -> None:
    _, plain = written("qwen_image")
    _, marked = written("qwen_image_edit_2511")
    assert set(marked) - set(plain) == {"__index_timestep_zero__"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda file: file.pop("double_blocks.3.img_attn.qkv.weight"),
            "img_attn.qkv.weight' is missing",
        ),
        (lambda file: file.update({"blocks.0.x": torch.ones(1)}), "'blocks.0.x' is of another model"),
        (lambda file: file.update({"img_in.weight": torch.ones(32, 5)}), r"shape \[32, 5\] in place of \[32, 4\]"),
    ],
)
def test_a_file_of_another_model_is_refused(change: Callable[[dict[str, Tensor]], Any], words: str) -> None:
    model, file = written("flux")
    change(file)
    with pytest.raises(UserError, match=words):
        from_file(load_names()["FluxTransformer2DModel"], model.state_dict(), held(file))


def test_the_page_says_what_the_tests_try() -> None:
    from tests.export.matrix import PAGE, table  # which imports this module

    page = PAGE.read_text()
    assert with_table(page, table()) == page, "write it anew: python -m tests.export.matrix"
