"""Every name that a tensor of a LoRA may have gets its new number, or is dropped with the part that it belongs to."""

from __future__ import annotations

import diffusers
import pytest

from ppcl_ds.errors import UserError
from ppcl_ds.export.names import load_names
from ppcl_ds.export.parts import parts_of
from ppcl_ds.export.renumber import Numbering
from tests.anatomies import anatomy_of
from tests.conftest import TEACHERS
from tests.plans import small_and_mixed

NAMES = {
    "transformer_blocks.3.attn.to_q.lora_A.weight": "transformer_blocks.2.attn.to_q.lora_A.weight",
    "transformer.single_transformer_blocks.4.proj_out.lora_B.weight": (
        "transformer.single_transformer_blocks.2.proj_out.lora_B.weight"
    ),
    "base_model.model.transformer_blocks.0.ff.net.0.proj.lora_A.weight": (
        "base_model.model.transformer_blocks.0.ff.net.0.proj.lora_A.weight"
    ),
    "diffusion_model.double_blocks.3.img_attn.qkv.lora_A.weight": (
        "diffusion_model.double_blocks.2.img_attn.qkv.lora_A.weight"
    ),
    "lora_unet_double_blocks_3_img_mlp_0.alpha": "lora_unet_double_blocks_2_img_mlp_0.alpha",
    "lora_unet_single_blocks_4_linear1.lora_up.weight": "lora_unet_single_blocks_2_linear1.lora_up.weight",
    "lora_transformer_single_transformer_blocks_4_attn_to_q.lora_down.weight": (
        "lora_transformer_single_transformer_blocks_2_attn_to_q.lora_down.weight"
    ),
    "double_blocks.1.processor.proj_lora1.down.weight": None,
    "lora_unet_single_blocks_3_linear2.alpha": None,
    "lora_unet_final_layer_adaLN_modulation_1.alpha": "lora_unet_final_layer_adaLN_modulation_1.alpha",
    "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_A.weight": (
        "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_A.weight"
    ),
    "context_embedder.refiner_blocks.1.lora_A.weight": "context_embedder.refiner_blocks.1.lora_A.weight",
}


PARTS_GONE = {
    "flux": [
        "transformer.transformer_blocks.2.ff.net.0.proj.lora_A.weight",
        "base_model.model.transformer_blocks.3.norm1_context.linear.lora_magnitude_vector",
        "lora_transformer_transformer_blocks_3_ff_context_net_2.lora_down.weight",
        "lora_unet_double_blocks_2_img_mlp_0.alpha",
        "lora_unet_double_blocks_3_txt_mlp_2.lora_up.weight",
        "lora_unet_double_blocks_3_txt_attn_proj.lokr_w1",
        "diffusion_model.double_blocks.3.txt_mlp.0.lora_A.weight",
        "double_blocks.3.txt_mod.lin.diff_b",
        "double_blocks.3.txt_attn.proj.hada_w1_a",
        "double_blocks.3.processor.proj_lora2.down.weight",
    ],
    "sd3": [
        "transformer.transformer_blocks.4.attn.to_add_out.lora_B.weight",
        "diffusion_model.joint_blocks.4.context_block.mlp.fc1.lora_A.weight",
        "model.diffusion_model.joint_blocks.4.context_block.attn.proj.lora_A.weight",
        "lora_unet_joint_blocks_5_context_block_adaLN_modulation_1.alpha",
        "lora_unet_joint_blocks_2_x_block_mlp_fc2.alpha",
    ],
}
PARTS_KEPT = {
    "flux": [
        "transformer.transformer_blocks.{2}.ff_context.net.0.proj.lora_A.weight",
        "lora_transformer_transformer_blocks_{2}_ff_context_net_2.lora_down.weight",
        "lora_unet_double_blocks_{2}_txt_attn_proj.alpha",
        "lora_unet_double_blocks_{3}_img_mlp_0.alpha",
        "lora_unet_double_blocks_{3}_txt_attn_qkv.alpha",
        "diffusion_model.double_blocks.{3}.img_mod.lin.lora_A.weight",
        "double_blocks.{3}.processor.proj_lora1.down.weight",
        "double_blocks.{3}.processor.qkv_lora2.down.weight",
        "transformer_blocks.{3}.attn.add_k_proj.lora_A.weight",
        "transformer_blocks.{3}.norm1.linear.lora_A.weight",
    ],
    "sd3": [
        "diffusion_model.joint_blocks.{4}.context_block.attn.qkv.lora_A.weight",
        "diffusion_model.joint_blocks.{4}.x_block.mlp.fc1.lora_A.weight",
        "lora_unet_joint_blocks_{5}_x_block_attn_proj.alpha",
        "lora_unet_joint_blocks_{3}_context_block_mlp_fc2.alpha",
    ],
}
"""In braces, the number of a block in the teacher."""


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_part_that_a_unit_replaces_is_dropped_under_every_name_and_no_other_part_is(family: str) -> None:
    numbering = numbering_of(family, "mixed")
    assert {key: numbering.rename(key).name for key in PARTS_GONE[family]} == dict.fromkeys(PARTS_GONE[family])
    new = {"flux": {2: "1", 3: "2"}, "sd3": {3: "2", 4: "3", 5: "4"}}[family]
    for key in PARTS_KEPT[family]:
        before, number, after = key.replace("}", "{").split("{")
        assert numbering.rename(f"{before}{number}{after}").name == f"{before}{new[int(number)]}{after}"


def numbering_of(family: str, variant: str) -> Numbering:
    class_name, config = TEACHERS[family]
    model = getattr(diffusers, class_name)(**config)
    names = load_names()[class_name]
    parts = parts_of(anatomy_of(model), names)
    lists = {name: len(getattr(model, name)) for name in parts}
    return Numbering(lists, ["context_embedder"], parts, small_and_mixed(family), variant, names.roots)


def test_every_layout_of_names_is_renumbered_list_by_list() -> None:
    numbering = numbering_of("flux", "small")
    assert {key: numbering.rename(key).name for key in NAMES} == NAMES
    for key in ("lora_unet_down_blocks_0_attentions_1.alpha", "net.layers.1.lora_A.weight"):
        with pytest.raises(UserError, match=rf"'{key}' looks like one of '\w+', but"):
            numbering.rename(key)
    with pytest.raises(UserError, match="looks like one of 'double_blocks', but the teacher's lists of blocks are: tr"):
        numbering_of("qwen", "small").rename("double_blocks.0.img_mlp.0.lora_A")
