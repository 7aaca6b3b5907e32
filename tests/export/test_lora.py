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
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.kinds import build_unit
from ppcl_ds.units.plan import UnitPlan
from ppcl_ds.units.variant import assembled
from tests.calls import answer, random_arguments
from tests.conftest import TEACHERS, command
from tests.pipelines import make_pipeline
from tests.plans import LINE, SMALL, THIN, small_and_mixed

KEPT = {
    ("qwen", "small"): {"transformer_blocks": {0: 0, 3: 2, 4: 3, 5: 4}},
    ("flux", "small"): {"transformer_blocks": {0: 0, 3: 2}, "single_transformer_blocks": {0: 0, 4: 2}},
    ("qwen", "mixed"): {"transformer_blocks": {0: 0, 1: 1, 2: 2, 5: 4}},
    ("flux", "mixed"): {"transformer_blocks": {2: 1, 3: 2}, "single_transformer_blocks": {3: 1, 4: 2}},
}
"""Family and variant -> list -> old and new number of each block that stays, counted by hand."""
GONE: dict[tuple[str, str], tuple[str, ...]] = {
    ("qwen", "mixed"): ("0.img_mlp", "0.txt_mlp", "2.txt_mod", "2.txt_mlp", "2.attn.to_add_out", "2.img_mlp"),
    ("flux", "mixed"): ("2.ff", "3.norm1_context", "3.ff_context", "3.attn.to_add_out"),
}
"""The parts of these blocks, of the list `transformer_blocks`, that do not stay."""
EVERYWHERE = ["to_q", "to_k", "add_v_proj", "to_add_out", "to_out.0", "net.0.proj", "net.2", "proj_out", "proj_mlp"]
EVERYWHERE += ["img_mod.1", "txt_mod.1", "norm1.linear", "norm1_context.linear"]
"""Endings of names in and around all parts of a block; FLUX's `proj_out` is a module of its own, too."""

NOTHING_BESIDE: dict[str, dict[str, Any]] = {
    "qwen": dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer")),
    "flux": dict.fromkeys(("scheduler", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
}
"""The other components of the stock pipelines: a LoRA of the transformer does not need them."""


@pytest.fixture(params=["qwen", "flux"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    """A pipeline folder with a teacher in it, and a plan beside it."""
    make_pipeline(family, tmp_path / "pipeline")
    small_and_mixed(family).save(tmp_path / "plan.yaml")
    return tmp_path


def teacher_of(folder: Path, family: str) -> Any:
    return getattr(diffusers, TEACHERS[family][0]).from_pretrained(folder / "pipeline" / "transformer")


def pruned_of(folder: Path, family: str, variant: str = "small") -> Any:
    """The variant with random units, as `ppcl consolidate` would write it."""
    teacher = Teacher(folder / "pipeline")

    def random(unit: UnitPlan) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(unit.span[0])
        fresh = build_unit(unit, teacher, torch.float32).core.state_dict()
        return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in fresh.items()}

    return assembled(teacher, small_and_mixed(family), variant, random)


def train_lora(teacher: Any, targets: list[str] | str) -> None:
    """Give the teacher a LoRA whose rank and alpha differ from block to block, with random weights."""
    torch.manual_seed(2)
    pattern = {r"transformer_blocks\.[35]\.attn\.to_q": 2, "0.attn.to_k": 3, "to_add_out": 5}
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, rank_pattern=pattern, alpha_pattern=pattern, init_lora_weights=False
    )
    teacher.add_adapter(config)


def alpha_of(module: str) -> float:
    """What `train_lora` says, by hand."""
    name, *rest = module.split(".")
    if name == "transformer_blocks" and rest[1:] == ["attn", "to_q"] and rest[0] in "35":
        return 2
    if rest[1:] == ["attn", "to_add_out"]:
        return 5
    return 3 if rest == ["0", "attn", "to_k"] else 6


def merged_by_hand(model: nn.Module, lora: dict[str, Tensor], family: str, variant: str = "small") -> nn.Module:
    """The pruned model with the LoRA of the teacher added to the weights of the blocks and parts that stayed."""
    state = model.state_dict()
    kept = KEPT[family, variant]
    gone = tuple(f"transformer_blocks.{part}." for part in GONE.get((family, variant), ()))
    for key, down in lora.items():
        module, found, _ = key.partition(".lora_A.")
        if not found:
            continue
        up = lora[key.replace("lora_A", "lora_B")]
        name, *rest = module.split(".")
        if name in kept:
            if int(rest[0]) not in kept[name] or f"{module}.".startswith(gone):
                continue
            place = ".".join([name, str(kept[name][int(rest[0])]), *rest[1:]])
        else:
            place = module
        state[f"{place}.weight"] += alpha_of(module) / len(down) * (up @ down)
    return model


def adapter_of(model: Any) -> dict[str, Tensor]:
    """What its one adapter has a place for: as many tensors as were loaded, if none was missing or unexpected."""
    (name,) = model.peft_config
    return get_peft_model_state_dict(model, adapter_name=name)


def velocity(model: nn.Module, family: str) -> Tensor:
    return answer(model, random_arguments(TEACHERS[family][0], lengths=(3,), sigmas=(0.5,)))


@pytest.mark.parametrize("variant", ["small", "mixed"])
def test_stock_diffusers_loads_it_into_the_variant_with_the_same_effect(
    folder: Path, family: str, variant: str
) -> None:
    teacher = teacher_of(folder, family)
    train_lora(teacher, [*EVERYWHERE, "time_text_embed.timestep_embedder.linear_1"])
    teacher.save_lora_adapter(folder, weight_name="lora.safetensors")
    remap(folder / "lora.safetensors", folder / "plan.yaml", variant, folder / "pipeline")
    model = pruned_of(folder, family, variant)
    # Told only the whole path, diffusers does not look for the ranks and alphas in the file's metadata.
    model.load_lora_adapter(folder, weight_name=f"lora-{variant}.safetensors", prefix=None)
    assert set(adapter_of(model)) == set(load_file(folder / f"lora-{variant}.safetensors"))
    (adapter,) = model.peft_config.values()
    modules = {f"^{key.partition('.lora_')[0]}" for key in adapter_of(model)}
    for patterns in (adapter.rank_pattern, adapter.alpha_pattern):
        assert any(name.endswith("to_add_out") for name in patterns)
        assert patterns.keys() <= modules
    plain = pruned_of(folder, family, variant)
    before = velocity(plain, family)
    expected = merged_by_hand(plain, load_file(folder / "lora.safetensors"), family, variant)
    assert not torch.allclose(before, velocity(expected, family), atol=1e-2)
    torch.testing.assert_close(velocity(model, family), velocity(expected, family), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen"])
def test_the_teachers_blocks_say_which_parts_a_kohya_file_loses(folder: Path, family: str) -> None:
    modules = ["attn_to_add_out", "attn_add_q_proj", "img_mlp_net_2", "txt_mlp_net_0_proj", "txt_mod_1", "img_mod_1"]
    names = [f"lora_unet_transformer_blocks_{k}_{module}.lora_up.weight" for k in range(6) for module in modules]
    save_file({name: torch.full((1,), float(place)) for place, name in enumerate(names)}, folder / "lora.safetensors")
    lora, plan = folder / "lora.safetensors", folder / "plan.yaml"
    teacher = folder / "pipeline"
    printed = command("lora", "remap", lora, "--plan", plan, "--variant", "mixed", "--teacher", teacher)
    stayed = {0: (0, [0, 1, 4, 5]), 1: (1, range(6)), 2: (2, [1, 5]), 5: (4, range(6))}
    expected = {
        f"lora_unet_transformer_blocks_{new}_{modules[place]}.lora_up.weight": float(6 * old + place)
        for old, (new, places) in stayed.items()
        for place in places
    }
    remapped = load_file(folder / "lora-mixed.safetensors")
    assert {name: tensor.item() for name, tensor in remapped.items()} == expected
    kept, *dropped = printed.splitlines()[:5]
    assert kept == "tensors kept: 18 in 4 blocks, 0 outside the blocks"
    assert [line.removeprefix("tensors dropped, replaced by ") for line in dropped] == [
        "thin: transformer_blocks 0 (2); of img_mlp_net_2, txt_mlp_net_0_proj",
        "group: transformer_blocks 2 (3); of attn_to_add_out, txt_mlp_net_0_proj, txt_mod_1",
        "line: transformer_blocks 2 (1); of img_mlp_net_2",
        "late: transformer_blocks 3 (6), 4 (6); of " + ", ".join(sorted(modules)),
    ]


def test_a_pipeline_loads_what_a_pipeline_saved(folder: Path, family: str) -> None:
    teacher = teacher_of(folder, family)
    train_lora(
        teacher,
        r"transformer_blocks\.\d+\.attn\.(to_q|to_add_out)|transformer_blocks\.0\.attn\.to_k|.*norm_out\.linear",
    )
    pipeline_class = getattr(diffusers, {"qwen": "QwenImagePipeline", "flux": "FluxPipeline"}[family])
    described = teacher.peft_config["default"].to_dict()
    pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(teacher),
        transformer_lora_adapter_metadata=described,
        weight_name="lora.safetensors",
    )
    remap(folder / "lora.safetensors", folder / "plan.yaml", "small", folder / "pipeline")
    pipeline = pipeline_class(**NOTHING_BESIDE[family], transformer=pruned_of(folder, family))
    pipeline.load_lora_weights(folder / "lora-small.safetensors")
    loaded = {f"transformer.{key}" for key in adapter_of(pipeline.transformer)}
    assert loaded == set(load_file(folder / "lora-small.safetensors"))
    lora = {key.removeprefix("transformer."): tensor for key, tensor in load_file(folder / "lora.safetensors").items()}
    expected = merged_by_hand(pruned_of(folder, family), lora, family)
    torch.testing.assert_close(velocity(pipeline.transformer, family), velocity(expected, family), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen"])
def test_a_kohya_file_stays_one(folder: Path, family: str) -> None:
    torch.manual_seed(4)
    lora: dict[str, Tensor] = {}
    kohya = {"lora_te1_text_model_encoder_layers_1_mlp_fc1.alpha": torch.tensor(1.0)}
    for module in [f"transformer_blocks.{k}.attn.to_q" for k in range(6)] + ["proj_out"]:
        down, up = torch.randn(4, 32), torch.randn(4 if module == "proj_out" else 32, 4)
        lora |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        flat = "lora_unet_" + module.replace(".", "_")
        kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        kohya[f"{flat}.alpha"] = torch.tensor(float(alpha_of(module)))
    save_file(kohya, folder / "lora.safetensors", {"ss_network_dim": "4"})
    out = folder / "other" / "for small.safetensors"
    printed = command(
        "lora", "remap", folder / "lora.safetensors", "--plan", folder / "plan.yaml", "--variant", "small",
        "--out", out, "--teacher", folder / "pipeline",
    )  # fmt: skip
    assert "tensors kept: 12 in 4 blocks, 4 outside the blocks" in printed
    assert "dropped, replaced by early: transformer_blocks 1 (3), 2 (3); of attn_to_q" in printed
    with safe_open(out, framework="pt") as opened:
        assert opened.metadata() == {"ss_network_dim": "4"}
    remapped = load_file(out)
    assert remapped.keys() - kohya.keys() == set()
    assert remapped.pop("lora_te1_text_model_encoder_layers_1_mlp_fc1.alpha") == 1
    save_file(remapped, out)
    pipeline = diffusers.QwenImagePipeline(**NOTHING_BESIDE[family], transformer=pruned_of(folder, family))
    pipeline.load_lora_weights(out)
    assert len(adapter_of(pipeline.transformer)) == 2 * 5
    expected = merged_by_hand(pruned_of(folder, family), lora, family)
    torch.testing.assert_close(velocity(pipeline.transformer, family), velocity(expected, family), rtol=1e-4, atol=1e-4)


def test_the_run_of_a_plan_tells_the_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_and_mixed("flux").save(tmp_path / "plan.yaml")
    save_file({"single_transformer_blocks.4.norm.linear.lora_A.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"no run beside it .* FluxTransformer2DModel lies; give --teacher"):
        remap(tmp_path / "lora.safetensors", tmp_path / "plan.yaml", "small")
    make_pipeline("flux", tmp_path / "teacher")
    for weights in (tmp_path / "teacher").rglob("*.safetensors"):
        weights.unlink()  # configurations are enough
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "recipe.json").write_text(json.dumps({"teacher": {"path": str(tmp_path / "teacher")}}))
    remap(tmp_path / "lora.safetensors", tmp_path / "plan.yaml", "small")
    remapped = load_file(tmp_path / "lora-small.safetensors")
    assert list(remapped) == ["single_transformer_blocks.2.norm.linear.lora_A.weight"]
    assert "tensors kept: 1 in 1 blocks, 0 outside the blocks" in capsys.readouterr().out


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder."""
    folder = tmp_path_factory.mktemp("qwen") / "pipeline"
    make_pipeline("qwen", folder)
    return folder


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
        (only_replaced, "variant 'small' has none of the parts that it changes"),
        (no_lora, "holds no LoRA; its first tensor is 'transformer_blocks.1.attn.to_q.weight'"),
        (pickled, "no readable safetensors file"),
        (torn_metadata, "its lora_adapter_metadata cannot be read"),
    ],
)
def test_a_file_that_cannot_be_remapped_is_refused(
    write: Callable[[Path], None], words: str, tmp_path: Path, qwen: Path
) -> None:
    small_and_mixed("qwen").save(tmp_path / "plan.yaml")
    write(tmp_path / "lora.safetensors")
    with pytest.raises(UserError) as fault:
        remap(tmp_path / "lora.safetensors", tmp_path / "plan.yaml", "small", qwen)
    assert words in str(fault.value)
    assert "\n" not in str(fault.value)
    assert not (tmp_path / "lora-small.safetensors").exists()


def test_wrong_arguments_are_refused(tmp_path: Path, qwen: Path) -> None:
    small_and_mixed("qwen").save(tmp_path / "plan.yaml")
    only_replaced(tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="variant 'large' is not in the plan; it has: small, mixed"):
        remap(tmp_path / "lora.safetensors", tmp_path / "plan.yaml", "large", qwen)
    with pytest.raises(UserError, match=r"plan .*other\.yaml: not found"):
        remap(tmp_path / "lora.safetensors", tmp_path / "other.yaml", "small", qwen)
    (tmp_path / "lora.bin").touch()
    with pytest.raises(UserError, match=r"only \.safetensors files are read"):
        remap(tmp_path / "lora.bin", tmp_path / "plan.yaml", "small", qwen)
    early, plan = SMALL["qwen"][0], small_and_mixed("qwen")
    for other, words in {
        early.model_copy(update={"name": "other"}): r"spans \[1, 2\] of 'early' and \[1, 2\] of 'other' overlap",
        LINE.model_copy(update={"name": "other"}): "'other' needs block 2, which 'early' replaces",
        LINE.model_copy(update={"name": "other", "span": (6, 6)}): r"span \[6, 6\] is not possible",
        THIN.model_copy(update={"name": "other", "span": (3, 4)}): r"span \[3, 4\] is not possible",
    }.items():
        wrong = {"units": (*plan.units, other), "variants": {"small": ("early", "other")}}
        plan.model_copy(update=wrong).save(tmp_path / "plan.yaml")
        with pytest.raises(UserError, match=words):
            remap(tmp_path / "lora.safetensors", tmp_path / "plan.yaml", "small", qwen)
