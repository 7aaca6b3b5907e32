"""A LoRA of the teacher, remapped, does in a variant what it did in the blocks that stayed; stock tools load it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppcl_ds.errors import UserError
from ppcl_ds.export.lora import remap
from ppcl_ds.export.renumber import Numbering
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.families.sources import held
from ppcl_ds.families.surgery import lay_out
from ppcl_ds.planning.plan import Plan, UnitPlan
from tests.conftest import TEACHERS, command
from tests.data.tiny_pipelines import make_pipeline

UNITS = {
    "qwen": (UnitPlan(name="early", span=(1, 2), streams=("image", "text")),),
    "flux": (
        UnitPlan(name="double", span=(1, 2), streams=("image", "text")),
        UnitPlan(name="single", span=(5, 7), streams=("image", "text")),
    ),
}
KEPT = {
    "qwen": {"transformer_blocks": {0: 0, 3: 2, 4: 3, 5: 4}},
    "flux": {"transformer_blocks": {0: 0, 3: 2}, "single_transformer_blocks": {0: 0, 4: 2}},
}
"""Family -> list -> old and new number of each block that stays, counted by hand."""


@pytest.fixture(params=["qwen", "flux"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    """A pipeline folder with a teacher in it, and a plan beside it."""
    make_pipeline(family, tmp_path / "pipeline")
    plan_of(family).save(tmp_path / "plan.yaml")
    return tmp_path


def plan_of(family: str) -> Plan:
    class_name, config = TEACHERS[family]
    blocks = config["num_layers"] + config.get("num_single_layers", 0)
    names = tuple(unit.name for unit in UNITS[family])
    return Plan(teacher=class_name, blocks=blocks, units=UNITS[family], variants={"small": names})


def teacher_of(folder: Path, family: str) -> Any:
    return getattr(diffusers, TEACHERS[family][0]).from_pretrained(folder / "pipeline" / "transformer")


def pruned_of(folder: Path, family: str) -> Any:
    """The variant with random units, as a stock model."""
    files = ModelFiles(folder / "pipeline")
    anatomy = Anatomy(files.empty_model())
    torch.manual_seed(1)
    places = []
    for origin, unit in plan_of(family).places("small"):
        key = f"{anatomy.blocks[origin].key}."
        own = {name.removeprefix(key): files.tensor(name) for name in files.keys if name.startswith(key)}
        random = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in own.items()}
        places.append((origin, None if unit is None else held(random)))
    config, sources = lay_out(files, anatomy, places)
    model = files.empty_model(config)
    model.load_state_dict({name: source.load() for name, source in sources.items()}, assign=True)
    return model


def train_lora(teacher: Any, targets: list[str] | str) -> None:
    """Give the teacher a LoRA whose rank and alpha differ from block to block, with random weights."""
    torch.manual_seed(2)
    pattern = {r"transformer_blocks\.[35]\.attn\.to_q": 2, "0.attn.to_k": 3}
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, rank_pattern=pattern, alpha_pattern=pattern, init_lora_weights=False
    )
    teacher.add_adapter(config)


def alpha_of(module: str) -> float:
    """What `train_lora` says, by hand."""
    name, *rest = module.split(".")
    if name == "transformer_blocks" and rest[1:] == ["attn", "to_q"] and rest[0] in "35":
        return 2
    return 3 if rest == ["0", "attn", "to_k"] else 6


def merged_by_hand(model: nn.Module, lora: dict[str, Tensor], family: str) -> nn.Module:
    """The pruned model with the LoRA of the teacher added to the weights of the blocks that stayed."""
    state = model.state_dict()
    for key, down in lora.items():
        module, found, _ = key.partition(".lora_A.")
        if not found:
            continue
        up = lora[key.replace("lora_A", "lora_B")]
        name, *rest = module.split(".")
        if name in KEPT[family]:
            if int(rest[0]) not in KEPT[family][name]:
                continue
            place = ".".join([name, str(KEPT[family][name][int(rest[0])]), *rest[1:]])
        else:
            place = module
        state[f"{place}.weight"] += alpha_of(module) / len(down) * (up @ down)
    return model


def adapter_of(model: Any) -> dict[str, Tensor]:
    """What its one adapter has a place for: as many tensors as were loaded, if none was missing or unexpected."""
    (name,) = model.peft_config
    return get_peft_model_state_dict(model, adapter_name=name)


def velocity(model: nn.Module, family: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(1, 4, 16, generator=generator)
    text = torch.randn(1, 3, 16, generator=generator)
    arguments: dict[str, Any] = {"hidden_states": image, "encoder_hidden_states": text, "timestep": torch.tensor([0.5])}
    if family == "qwen":
        arguments |= {"encoder_hidden_states_mask": torch.ones(1, 3), "img_shapes": [[(1, 2, 2)]]}
    else:
        arguments |= {
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(3, 3),
            "pooled_projections": torch.ones(1, 8),
        }
    with torch.no_grad():
        return model(**arguments, return_dict=False)[0]


def test_stock_diffusers_loads_it_into_the_variant_with_the_same_effect(folder: Path, family: str) -> None:
    """FLUX's `proj_out` is a module of its own and one of each single block, the replaced ones included."""
    teacher = teacher_of(folder, family)
    train_lora(teacher, ["to_q", "to_k", "proj_out", "time_text_embed.timestep_embedder.linear_1"])
    teacher.save_lora_adapter(folder, weight_name="lora.safetensors")
    remap(folder / "lora.safetensors", folder / "plan.yaml", "small", folder / "pipeline")
    model = pruned_of(folder, family)
    # Told only the whole path, diffusers does not look for the ranks and alphas in the file's metadata.
    model.load_lora_adapter(folder, weight_name="lora-small.safetensors", prefix=None)
    assert set(adapter_of(model)) == set(load_file(folder / "lora-small.safetensors"))
    expected = merged_by_hand(pruned_of(folder, family), load_file(folder / "lora.safetensors"), family)
    assert not torch.allclose(velocity(pruned_of(folder, family), family), velocity(expected, family), atol=1e-2)
    torch.testing.assert_close(velocity(model, family), velocity(expected, family), rtol=1e-4, atol=1e-5)


def test_a_pipeline_loads_what_a_pipeline_saved(folder: Path, family: str) -> None:
    teacher = teacher_of(folder, family)
    train_lora(teacher, r"transformer_blocks\.\d+\.attn\.to_q|transformer_blocks\.0\.attn\.to_k|.*norm_out\.linear")
    pipeline_class = getattr(diffusers, {"qwen": "QwenImagePipeline", "flux": "FluxPipeline"}[family])
    described = teacher.peft_config["default"].to_dict()
    pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(teacher),
        transformer_lora_adapter_metadata=described,
        weight_name="lora.safetensors",
    )
    remap(folder / "lora.safetensors", folder / "plan.yaml", "small", folder / "pipeline")
    pipeline = pipeline_class.from_pretrained(folder / "pipeline", transformer=pruned_of(folder, family))
    pipeline.load_lora_weights(folder / "lora-small.safetensors")
    loaded = {f"transformer.{key}" for key in adapter_of(pipeline.transformer)}
    assert loaded == set(load_file(folder / "lora-small.safetensors"))
    lora = {key.removeprefix("transformer."): tensor for key, tensor in load_file(folder / "lora.safetensors").items()}
    expected = merged_by_hand(pruned_of(folder, family), lora, family)
    torch.testing.assert_close(velocity(pipeline.transformer, family), velocity(expected, family), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen"])
def test_a_kohya_file_stays_one(folder: Path, family: str) -> None:
    """Through the command: with one list of blocks the plan is all that it needs."""
    torch.manual_seed(4)
    lora: dict[str, Tensor] = {}
    kohya = {"lora_te1_text_model_encoder_layers_1_mlp_fc1.alpha": torch.tensor(1.0)}
    for module in [f"transformer_blocks.{k}.attn.to_q" for k in range(6)] + ["proj_out"]:
        down, up = torch.randn(4, 32), torch.randn(16 if module == "proj_out" else 32, 4)
        lora |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        flat = "lora_unet_" + module.replace(".", "_")
        kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        kohya[f"{flat}.alpha"] = torch.tensor(float(alpha_of(module)))
    save_file(kohya, folder / "lora.safetensors", {"ss_network_dim": "4"})
    out = folder / "other" / "for small.safetensors"
    printed = command(
        "lora", "remap", folder / "lora.safetensors", "--plan", folder / "plan.yaml", "--variant", "small", "--out", out
    )
    assert "tensors kept: 12 in 4 blocks, 4 outside the blocks" in printed
    assert "dropped, replaced by early: transformer_blocks 1 (3), 2 (3); of attn_to_q" in printed
    with safe_open(out, framework="pt") as opened:
        assert opened.metadata() == {"ss_network_dim": "4"}
    remapped = load_file(out)
    assert remapped.keys() - kohya.keys() == set()
    assert remapped.pop("lora_te1_text_model_encoder_layers_1_mlp_fc1.alpha") == 1
    save_file(remapped, out)
    pipeline = diffusers.QwenImagePipeline.from_pretrained(folder / "pipeline", transformer=pruned_of(folder, family))
    pipeline.load_lora_weights(out)
    assert len(adapter_of(pipeline.transformer)) == 2 * 5
    expected = merged_by_hand(pruned_of(folder, family), lora, family)
    torch.testing.assert_close(velocity(pipeline.transformer, family), velocity(expected, family), rtol=1e-4, atol=1e-4)


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


def test_every_layout_of_names_is_renumbered_list_by_list() -> None:
    lists = {"transformer_blocks": 4, "single_transformer_blocks": 5}
    numbering = Numbering(lists, ["context_embedder"], plan_of("flux"), "small")
    assert {key: numbering.rename(key).name for key in NAMES} == NAMES
    for key in ("lora_unet_down_blocks_0_attentions_1.alpha", "net.layers.1.lora_A.weight"):
        with pytest.raises(UserError, match=rf"'{key}' looks like one of '\w+', but"):
            numbering.rename(key)
    with pytest.raises(UserError, match="looks like one of 'double_blocks', but the teacher's lists of blocks are: tr"):
        Numbering({"transformer_blocks": 6}, [], plan_of("qwen"), "small").rename("double_blocks.0.img_mlp.0.lora_A")


def test_the_run_of_a_plan_tells_the_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_of("flux").save(tmp_path / "plan.yaml")
    save_file({"single_transformer_blocks.4.norm.linear.lora_A.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"several lists of blocks \(transformer_blocks, single_.*give --teacher"):
        remap(tmp_path / "lora.safetensors", tmp_path / "plan.yaml", "small")
    (tmp_path / "teacher").mkdir()
    class_name, config = TEACHERS["flux"]
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config | {"_class_name": class_name}))
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "recipe.json").write_text(json.dumps({"teacher": {"path": str(tmp_path / "teacher")}}))
    remap(tmp_path / "lora.safetensors", tmp_path / "plan.yaml", "small")
    remapped = load_file(tmp_path / "lora-small.safetensors")
    assert list(remapped) == ["single_transformer_blocks.2.norm.linear.lora_A.weight"]
    assert "tensors kept: 1 in 1 blocks, 0 outside the blocks" in capsys.readouterr().out


def too_far(lora: Path) -> None:
    save_file({"transformer_blocks.6.attn.to_q.lora_A.weight": torch.ones(1)}, lora)


def only_replaced(lora: Path) -> None:
    save_file({"transformer_blocks.1.attn.to_q.lora_A.weight": torch.ones(1)}, lora)


def no_lora(lora: Path) -> None:
    save_file({"transformer_blocks.1.attn.to_q.weight": torch.ones(1)}, lora)


def pickled(lora: Path) -> None:
    torch.save({"transformer_blocks.1.attn.to_q.lora_A.weight": torch.ones(1)}, lora)


def torn_metadata(lora: Path) -> None:
    metadata = {"lora_adapter_metadata": '{"target_modules": ['}
    save_file({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1)}, lora, metadata)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (
            too_far,
            "'transformer_blocks.6.attn.to_q.lora_A.weight' is beyond the 6 blocks of the teacher's",
        ),
        (only_replaced, "variant 'small' has none of the blocks that it changes"),
        (no_lora, "holds no LoRA; its first tensor is 'transformer_blocks.1.attn.to_q.weight'"),
        (pickled, "no readable safetensors file"),
        (torn_metadata, "its lora_adapter_metadata cannot be read"),
    ],
)
def test_a_file_that_cannot_be_remapped_is_refused(write: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    plan_of("qwen").save(tmp_path / "plan.yaml")
    write(tmp_path / "lora.safetensors")
    with pytest.raises(UserError) as fault:
        remap(tmp_path / "lora.safetensors", tmp_path / "plan.yaml", "small")
    assert words in str(fault.value)
    assert "\n" not in str(fault.value)
    assert not (tmp_path / "lora-small.safetensors").exists()


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    plan_of("qwen").save(tmp_path / "plan.yaml")
    only_replaced(tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="variant 'large' is not in the plan; it has: small"):
        remap(tmp_path / "lora.safetensors", tmp_path / "plan.yaml", "large")
    with pytest.raises(UserError, match=r"plan .*other\.yaml: No such file"):
        remap(tmp_path / "lora.safetensors", tmp_path / "other.yaml", "small")
    (tmp_path / "lora.bin").touch()
    with pytest.raises(UserError, match=r"only \.safetensors files are read"):
        remap(tmp_path / "lora.bin", tmp_path / "plan.yaml", "small")
    overlapping = plan_of("qwen").model_copy(
        update={"units": (*UNITS["qwen"], UNITS["qwen"][0].model_copy(update={"name": "twice"}))}
    )
    overlapping.model_copy(update={"variants": {"small": ("early", "twice")}}).save(tmp_path / "plan.yaml")
    with pytest.raises(UserError, match="spans of variant 'small' overlap"):
        remap(tmp_path / "lora.safetensors", tmp_path / "plan.yaml", "small")
