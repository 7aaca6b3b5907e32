"""GGUF files: the format's own reader reads them, and diffusers draws from them what it draws from the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig

from ppcl_ds.errors import UserError
from ppcl_ds.export.consolidate import Form, consolidate
from ppcl_ds.export.gguf_file import TYPES, check_package, gguf_tensors, write_gguf
from ppcl_ds.teacher.files import held
from ppcl_ds.units.variant import Layout
from tests.conftest import command
from tests.export.trained import pretend_trained
from tests.families.teachers import shake
from tests.families.tiny import noise

WIDE = dict(attention_head_dim=32, num_attention_heads=2)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen_image": (
        "QwenImageTransformer2DModel",
        WIDE | dict(in_channels=4, out_channels=1, num_layers=2, joint_attention_dim=16, axes_dims_rope=(8, 12, 12)),
        dict(
            hidden_states=noise(1, 16, 4),
            encoder_hidden_states=noise(1, 5, 16),
            encoder_hidden_states_mask=torch.ones(1, 5).bool(),
            timestep=torch.tensor([0.4]),
            img_shapes=[[(1, 4, 4)]],
        ),
    ),
    "lumina2": (
        "ZImageTransformer2DModel",
        dict(in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16)
        | dict(axes_dims=[8, 12, 12], axes_lens=[64, 32, 32]),
        dict(x=[noise(4, 1, 8, 8)], t=torch.tensor([0.6]), cap_feats=[noise(5, 16)]),
    ),
    "wan": (
        "WanTransformer3DModel",
        WIDE
        | dict(patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=96, num_layers=2)
        | dict(qk_norm="rms_norm_across_heads", rope_max_seq_len=32),
        dict(hidden_states=noise(1, 4, 2, 4, 4), encoder_hidden_states=noise(1, 5, 16), timestep=torch.tensor([400])),
    ),
}
FURTHEST = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 2e-2, "Q5_0": 0.1, "Q4_0": 0.25}
"""How far an answer may be from that of the plain weights, relative to it."""


def tiny(arch: str) -> Any:
    class_name, config, _ = MODELS[arch]
    torch.manual_seed(0)
    model = getattr(diffusers, class_name)(**config).eval()
    shake(model)
    return model


def layout_of(model: Any) -> Layout:
    return Layout(dict(model.config) | {"_class_name": type(model).__name__}, held(model.state_dict()), 0)


def answer(model: Any, arch: str) -> torch.Tensor:
    with torch.no_grad():
        output = model(**MODELS[arch][2], return_dict=False)[0]
    return output[0] if isinstance(output, list) else output


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("arch", MODELS)
def test_diffusers_draws_from_it(arch: str, kind: str, tmp_path: Path) -> None:
    model = tiny(arch)
    model.save_pretrained(tmp_path / "transformer")
    name, tensors = gguf_tensors(layout_of(model), "comfyui")
    file = tmp_path / "model.gguf"
    write_gguf(name, tensors, file, kind)
    loaded = type(model).from_single_file(
        str(file),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(tmp_path),
        subfolder="transformer",
        local_files_only=True,
    )
    plain, quantised = answer(model, arch), answer(loaded.eval(), arch)
    error = (quantised - plain).norm() / plain.norm()
    assert 0 < error < FURTHEST[kind]


@pytest.mark.parametrize("kind", TYPES)
def test_the_formats_own_reader_finds_what_the_tools_look_for(kind: str, tmp_path: Path) -> None:
    model = tiny("wan")
    arch, tensors = gguf_tensors(layout_of(model), "comfyui")
    write_gguf(arch, tensors, tmp_path / "model.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == "wan"
    assert reader.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    found = {each.name: each for each in reader.tensors}
    assert list(found) == list(tensors)
    for name, each in found.items():
        assert tuple(reversed(each.shape.tolist())) == tuple(tensors[name].shape)
    types = {name: each.tensor_type.name for name, each in found.items()}
    assert types["blocks.1.self_attn.q.weight"] == types["blocks.0.ffn.2.weight"] == kind
    for name in (
        "patch_embedding.weight",
        "blocks.0.modulation",
        "blocks.0.self_attn.norm_q.weight",
        "head.head.weight",
    ):
        assert types[name] == "F32"
    values = gguf.quants.dequantize(found["blocks.1.self_attn.q.weight"].data, gguf.GGMLQuantizationType[kind])
    original = tensors["blocks.1.self_attn.q.weight"].load().numpy()
    assert np.abs(values.reshape(original.shape) - original).max() < FURTHEST[kind] * np.abs(original).max()


def test_consolidate_writes_one_beside_the_folder(new_run: Callable[..., Path]) -> None:
    path = new_run("sd3")
    recipe = pretend_trained(path, "sd3")
    printed = command("consolidate", path, "--variant", "small", "--gguf", "Q8_0", code=2)
    assert "ComfyUI does not count num_layers" in printed
    consolidate(recipe, ["small"], Form(single_file="sd.cpp", gguf="Q8_0"))
    folder = recipe.pruned("small").parent
    reader = gguf.GGUFReader(folder / "small-Q8_0.gguf")
    assert reader.fields["general.architecture"].contents() == "sd3"
    assert "joint_blocks.2.x_block.attn.qkv.weight" in {each.name for each in reader.tensors}
    assert "small-Q8_0.gguf" in (folder / "SHA256SUMS").read_text()
    assert "`small-Q8_0.gguf` holds them quantised" in (folder / "README.md").read_text()


def test_a_type_that_needs_a_compiler_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--gguf: 'Q4_K' is not one of F16, BF16, Q8_0, Q5_0, Q4_0"):
        Form.checked(None, "5GB", None, "Q4_K", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ppcl-ds\[gguf\]'"):
        check_package()
