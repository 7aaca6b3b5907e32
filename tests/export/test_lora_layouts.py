"""LoRAs as other tools write them, for families by the names of their first releases: written by hand, name for name.

Sources: PEFT (`base_model.model`), diffusers and SimpleTuner (`transformer.`), ai-toolkit and ComfyUI
(`diffusion_model.`), DiffSynth (`lora_A.default`), kohya and musubi (`lora_unet_`), OneTrainer (`lora_transformer_`),
LyCORIS (`lycoris_`, LoKr and LoHa), DoRA (`lora_magnitude_vector`, `dora_scale`), Lightning files (`.diff`).
"""

from __future__ import annotations

import copy
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl_ds.errors import UserError
from ppcl_ds.export.lora import numbering, remap
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import Plan, UnitPlan
from tests.conftest import command
from tests.families.teachers import build
from tests.pipelines import make_pipeline
from tests.plans import small_and_mixed

LAYOUTS = {
    "wan": [
        "diffusion_model.blocks.{}.self_attn.q.lora_A.weight",
        "diffusion_model.blocks.{}.cross_attn.k.lora_down.weight",
        "diffusion_model.blocks.{}.norm3.diff",
        "diffusion_model.blocks.{}.ffn.0.diff_b",
        "lora_unet_blocks_{}_self_attn_o.lora_up.weight",
        "lora_unet_blocks_{}_ffn_2.alpha",
        "transformer.blocks.{}.attn1.to_q.lora_A.weight",
        "blocks.{}.self_attn.q.lora_B.default.weight",
        "pipe.dit.blocks.{}.ffn.0.lora_A.default.weight",
        "lycoris_blocks_{}_attn2_to_v.lokr_w2_a",
    ],
    "z_image": [
        "diffusion_model.layers.{}.attention.to_q.lora_A.weight",
        "diffusion_model.layers.{}.attention.qkv.lora_B.weight",
        "lora_unet_layers_{}_feed_forward_w1.lora_down.weight",
        "base_model.model.layers.{}.attention.to_out.0.lora_magnitude_vector",
        "lycoris_layers_{}_attention_to_k.hada_w1_a",
        "transformer.layers.{}.adaLN_modulation.0.lora_B.weight",
    ],
    "krea2": [
        "diffusion_model.blocks.{}.attn.wq.lora_A.weight",
        "lora_unet_blocks_{}_mlp_up.dora_scale",
        "transformer.transformer_blocks.{}.ff.down.lora_B.weight",
        "lora_transformer_transformer_blocks_{}_attn_to_gate.alpha",
    ],
    "hunyuan_video_15": [
        "diffusion_model.double_blocks.{}.img_attn_qkv.lora_A.weight",
        "lora_unet_double_blocks_{}_txt_mlp_fc1.lora_up.weight",
        "transformer.transformer_blocks.{}.attn.to_q.lora_A.weight",
    ],
    "qwen_image": [
        "transformer_blocks.{}.attn.to_q.lora_A.default.weight",
        "transformer_blocks.{}.img_mlp.net.2.alpha",
        "diffusion_model.transformer_blocks.{}.txt_mod.1.lora_A.weight",
        "lora_unet_transformer_blocks_{}_img_mod_1.lokr_w1",
        "lycoris_transformer_blocks_{}_attn_add_q_proj.lokr_w2",
        "transformer.transformer_blocks.{}.attn.to_out.0.lora.up.weight",
    ],
}
"""Tiny teacher -> names of tensors in a block."""
OUTSIDE = {
    "wan": [
        "lora_unet_time_embedding_0.alpha",
        "diffusion_model.head.head.diff",
        "diffusion_model.text_embedding.0.diff",
    ],
    "z_image": ["diffusion_model.final_layer.linear.lora_A.weight", "lora_unet_cap_embedder_1.alpha"],
    "krea2": ["diffusion_model.txtfusion.layerwise_blocks.1.attn.wq.lora_A.weight", "lora_unet_last_linear.alpha"],
    "hunyuan_video_15": ["lora_unet_txt_in_individual_token_refiner_blocks_0_self_attn_qkv.alpha"],
    "qwen_image": ["lora_te1_text_model_encoder_layers_3_mlp_fc1.alpha", "text_encoder.layers.2.q.lora_A.weight"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tools_layout_is_renumbered(name: str, tmp_path: Path) -> None:
    model: Any
    model, inputs = build(name)
    model.save_pretrained(tmp_path / "teacher")
    teacher = Teacher(tmp_path / "teacher", run=lambda each: each(**copy.deepcopy(inputs), return_dict=False))
    start = next(block.index for block in teacher.blocks if "refiner" not in block.list_name)
    unit = UnitPlan(name="unit", span=(start + 1, start + 2), streams=("image",))
    plan = Plan(teacher=teacher.class_name, blocks=len(teacher.blocks), units=(unit,), variants={"v": ("unit",)})
    plan.save(tmp_path / "plan.yaml")
    dropped = numbering(tmp_path / "plan.yaml", "v", teacher)
    nearest = numbering(tmp_path / "plan.yaml", "v", teacher, "nearest")
    for key in LAYOUTS[name]:
        found = {old: dropped.rename(key.format(old)).name for old in range(5)}
        assert found == {0: key.format(0), 1: None, 2: None, 3: key.format(2), 4: key.format(3)}
        found = {old: nearest.rename(key.format(old)).name for old in range(5)}
        assert found == {0: key.format(0), 1: key.format(1), 2: None, 3: key.format(2), 4: key.format(3)}
    for key in OUTSIDE[name]:
        assert dropped.rename(key).name == key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline and its plan."""
    folder = tmp_path_factory.mktemp("loras")
    make_pipeline("qwen", folder / "pipeline")
    small_and_mixed("qwen").save(folder / "plan.yaml")
    return folder


def test_a_folder_of_loras_is_remapped_at_once_and_what_cannot_be_is_named(folder: Path, tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    loras.mkdir()
    for number in (0, 3):
        tensor = torch.full((2, 2), float(number))
        save_file({f"transformer_blocks.{number}.attn.to_q.lora_A.weight": tensor}, loras / f"of {number}.safetensors")
    save_file({"blocks.0.weight": torch.ones(1)}, loras / "whole.safetensors")
    (loras / "torn.safetensors").write_bytes((loras / "of 0.safetensors").read_bytes()[:-3])
    (loras / "notes.txt").write_text("not a LoRA")
    printed = command(
        "lora", "remap", loras, "--plan", folder / "plan.yaml", "--variant", "small", "--teacher", folder / "pipeline",
        code=2,
    )  # fmt: skip
    assert "2 of 4 LoRAs were not remapped: torn.safetensors, whole.safetensors" in printed.splitlines()[-1]
    assert "holds no LoRA; its first tensor is 'blocks.0.weight'" in printed
    written = tmp_path / "loras-small"
    assert sorted(path.name for path in written.iterdir()) == ["of 0.safetensors", "of 3.safetensors"]
    assert list(load_file(written / "of 3.safetensors")) == ["transformer_blocks.2.attn.to_q.lora_A.weight"]


def pickled(path: Path) -> None:
    torch.save({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1)}, path)


def truncated(path: Path) -> None:
    save_file({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(64)}, path)
    path.write_bytes(path.read_bytes()[:-64])


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 30) + b"{" + b" " * 1000)


def empty(path: Path) -> None:
    path.touch()


def counted_wrongly(path: Path) -> None:
    header = b'{"a.lora_A.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def of_another_model(path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(1)}, path)


@pytest.mark.parametrize("damage", [pickled, truncated, huge_header, empty, counted_wrongly, of_another_model])
def test_a_damaged_file_ends_in_one_line(damage: Any, folder: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    damage(lora)
    with pytest.raises(UserError, match=r"lora\.safetensors") as fault:
        remap(lora, folder / "plan.yaml", "small", folder / "pipeline")
    assert "\n" not in str(fault.value)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_an_unknown_strategy_and_an_empty_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--strategy: 'mean' is not one of drop, nearest"):
        remap(tmp_path, folder / "plan.yaml", "small", folder / "pipeline", strategy="mean")
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        remap(tmp_path, folder / "plan.yaml", "small", folder / "pipeline")
