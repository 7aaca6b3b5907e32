"""Any transformer class has a sibling that lacks parts, and text streams become linears wherever that can be."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ppcl_ds.export.model_folder import add_own_code
from ppcl_ds.teacher import modeling_pruned
from ppcl_ds.teacher.modeling_pruned import can_make_text_linear, ffn_parts, read_ffn
from ppcl_ds.units.ffn import down_of

Inputs = dict[str, Any]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def grid(*sizes: int) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(float(size)) for size in sizes))


TIME = torch.tensor([200.0, 700.0])
TEXT = noise(2, 5, 16)
PACKED = {"hidden_states": noise(2, 16, 4), "encoder_hidden_states": TEXT, "timestep": TIME / 1000}
IMAGE = {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": TEXT, "timestep": TIME / 1000}
VIDEO = {"hidden_states": noise(2, 4, 2, 4, 4), "encoder_hidden_states": TEXT, "timestep": TIME.long()}
MASK = torch.ones(2, 5).long()
IDS3, IDS4 = grid(1, 4, 4), torch.cat([grid(1, 4, 4), torch.zeros(16, 1)], 1)
TXT4 = torch.cat([torch.zeros(5, 3), torch.arange(5.0)[:, None]], 1)
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
FLUX = HEADS | {"in_channels": 4, "num_layers": 4, "num_single_layers": 1, "joint_attention_dim": 16}
TEACHERS: dict[str, tuple[dict[str, Any], Inputs]] = {
    "QwenImageTransformer2DModel": (
        HEADS
        | {
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 4,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        PACKED | {"encoder_hidden_states_mask": MASK.bool(), "img_shapes": [[(1, 4, 4)]] * 2},
    ),
    "FluxTransformer2DModel": (
        FLUX | {"patch_size": 1, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6)},
        PACKED | {"pooled_projections": noise(2, 8), "img_ids": IDS3, "txt_ids": torch.zeros(5, 3)},
    ),
    "SD3Transformer2DModel": (
        HEADS
        | {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 8,
        },
        IMAGE | {"pooled_projections": noise(2, 8)},
    ),
    "Flux2Transformer2DModel": (
        FLUX | {"axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False},
        PACKED | {"img_ids": IDS4, "txt_ids": TXT4},
    ),
    "ChromaTransformer2DModel": (
        FLUX
        | {
            "patch_size": 1,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 2,
        },
        PACKED
        | {
            "img_ids": IDS3,
            "txt_ids": torch.zeros(5, 3),
            "attention_mask": torch.ones(2, 21).bool(),
        },
    ),
    "AuraFlowTransformer2DModel": (
        HEADS
        | {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 4,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 64,
        },
        IMAGE,
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 4,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        VIDEO
        | {
            "encoder_attention_mask": MASK,
            "pooled_projections": noise(2, 8),
            "guidance": torch.full((2,), 6000.0),
        },
    ),
    "MotifVideoTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 4,
            "num_single_layers": 1,
            "num_decoder_layers": 0,
            "patch_size": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        VIDEO | {"encoder_attention_mask": MASK},
    ),
    "WanTransformer3DModel": (
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        VIDEO,
    ),
    "ZImageTransformer2DModel": (
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 32, 32],
        },
        {"x": [noise(4, 1, 8, 8)], "t": TIME[:1] / 1000, "cap_feats": [noise(5, 16)]},
    ),
    "MochiTransformer3DModel": (
        HEADS
        | {
            "patch_size": 2,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "max_sequence_length": 5,
        },
        VIDEO | {"encoder_attention_mask": MASK.bool()},
    ),
    "HiDreamImageTransformer2DModel": (
        HEADS
        | {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "caption_channels": [16, 8],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (16, 16),
            "llama_layers": (0, 1, 2, 3),
        },
        {
            "hidden_states": noise(2, 4, 8, 8),
            "timesteps": TIME.long(),
            "encoder_hidden_states_t5": TEXT,
            "encoder_hidden_states_llama3": noise(4, 2, 5, 8),
            "pooled_embeds": noise(2, 8),
        },
    ),
    "NucleusMoEImageTransformer2DModel": (
        HEADS
        | {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 1,
            "attention_head_dim": 32,
            "num_layers": 3,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 12, 12),
            "moe_enabled": True,
            "num_experts": 2,
            "moe_intermediate_dim": 16,
            "capacity_factors": [0.0, 2.0, 2.0],
        },
        PACKED | {"encoder_hidden_states_mask": MASK, "img_shapes": [(1, 4, 4)] * 2},
    ),
    "Krea2Transformer2DModel": (
        HEADS
        | {
            "in_channels": 4,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        {
            "hidden_states": noise(2, 16, 4),
            "encoder_hidden_states": noise(2, 5, 3, 16),
            "timestep": TIME / 1000,
            "position_ids": torch.cat([torch.zeros(5, 3), IDS3]),
            "encoder_attention_mask": MASK.bool(),
        },
    ),
}
LISTS = {"AuraFlow": "joint_transformer_blocks", "Wan": "blocks", "ZImage": "layers", "HiDream": "double_stream_blocks"}


def class_of(name: str) -> Any:
    return getattr(diffusers, name, None) or pytest.skip(f"this diffusers has no {name}")


def list_of(name: str) -> str:
    return next((found for start, found in LISTS.items() if name.startswith(start)), "transformer_blocks")


def varied(model: Any) -> Any:
    """Zeros and ones at the start would hide what a block does."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or not parameter.any() or not torch.isfinite(parameter).all():
                parameter.copy_(0.05 * torch.randn_like(parameter) + (parameter.dim() < 2))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def run(model: Any, inputs: Inputs) -> Tensor:
    output = model(**inputs, return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output


@pytest.mark.parametrize("name", TEACHERS)
def test_without_feed_forwards_it_comes_back_from_its_folder(name: str, tmp_path: Path) -> None:
    class_of(name)
    config, inputs = TEACHERS[name]
    stock = class_of(name)(**config)
    narrow: dict[str, int] = {}
    for place, blocks in enumerate(stock.get_submodule(list_of(name))):
        for part in ffn_parts(blocks):
            whole = blocks.get_submodule(part)
            narrow[f"{list_of(name)}.{place}.{part}"] = 0 if place else 3
            if not place:
                try:
                    read_ffn(whole)
                except ValueError:
                    narrow[f"{list_of(name)}.{place}.{part}"] = 0
    assert narrow
    own = getattr(modeling_pruned, f"Pruned{name}")
    assert own is getattr(modeling_pruned, f"Pruned{name}")
    assert own.__mro__[1] is class_of(name)
    model = varied(own(**config, narrow_ffn=narrow))
    for part, hidden in narrow.items():
        module = model.get_submodule(part)
        assert down_of(module).in_features == hidden if hidden else isinstance(module, nn.Linear)
    model.save_pretrained(tmp_path)
    found = own.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(found.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert dict(found.config)["narrow_ffn"] == narrow
    output = run(model, inputs)
    assert torch.isfinite(output).all()
    torch.testing.assert_close(run(found.eval(), inputs), output)  # weights lie elsewhere in memory: other kernels


def test_diffusers_finds_the_class_in_the_file_that_travels(tmp_path: Path) -> None:
    config, inputs = TEACHERS["WanTransformer3DModel"]
    own = modeling_pruned.PrunedWanTransformer3DModel
    model = varied(own(**config, narrow_ffn={"blocks.0.ffn": 5, "blocks.1.ffn": 0}))
    model.save_pretrained(tmp_path)
    add_own_code(tmp_path)
    found = diffusers.AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert type(found).__name__ == "PrunedWanTransformer3DModel"
    assert type(found) is not own, "the copy in the folder was run"
    assert torch.equal(run(found.eval(), inputs), run(model, inputs))


@pytest.mark.parametrize(
    "name", ["PrunedNothing", "PrunedAutoencoderKL2", "PrunedDiffusionPipeline", "Prunedtorch", "X"]
)
def test_other_names_are_no_classes(name: str) -> None:
    assert not hasattr(modeling_pruned, name)


JOINT = {
    name: place
    for place, names in enumerate(
        [["QwenImage", "Flux", "SD3", "Flux2", "Chroma", "AuraFlow"], ["HunyuanVideo", "MotifVideo"]]
    )
    for name in names
}
"""Families whose attention has weights of its own for the text -> place of the text in what a block returns."""


def full_name(family: str) -> str:
    return next(name for name in TEACHERS if name.startswith(f"{family}Transformer"))


@pytest.mark.parametrize("family", JOINT)
def test_a_linear_text_is_the_teachers_with_the_text_put_in_by_hooks(family: str) -> None:
    """Blocks 1 and 2 read a linear of block 0's text; the stream passes by them and jumps after 2."""
    name, place = full_name(family), JOINT[family]
    config, inputs = TEACHERS[name]
    stock, blocks = varied(class_of(name)(**config)), list_of(name)
    keys = [f"{blocks}.1", f"{blocks}.2"]
    own: Any = getattr(modeling_pruned, f"Pruned{name}")
    model = own(**config, linear_text=keys, text_jumps=keys[1:], text_place=place)
    loaded = model.load_state_dict(stock.state_dict(), strict=False)
    assert {key.rpartition(".")[0] for key in loaded.missing_keys} == {
        *(f"{key}.text_in" for key in keys),
        f"{keys[1]}.text_out",
    }
    assert all(key.startswith(tuple(keys)) for key in loaded.unexpected_keys)
    varied(model)
    for linear in (
        model.get_submodule(f"{keys[0]}.text_in"),
        *map(model.get_submodule, [f"{keys[1]}.text_in", f"{keys[1]}.text_out"]),
    ):
        linear.load_state_dict({"weight": 0.1 * noise(*linear.weight.shape), "bias": noise(len(linear.bias))})
    model.load_state_dict(
        {k: v for k, v in stock.state_dict().items() if k not in loaded.unexpected_keys}, strict=False
    )
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in stock.parameters())

    kept: dict[str, Tensor] = {}

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        kept["modulated"] = kwargs["encoder_hidden_states"]

    def hand_over(key: str, module: Any, args: Any, kwargs: Any) -> Any:
        linear = model.get_submodule(f"{key}.text_in")
        x = kept["modulated"]
        return args, kwargs | {"encoder_hidden_states": x + x @ linear.weight.T + linear.bias}

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        kept["text"] = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)

    def leave(key: str, module: Any, args: Any, output: Any) -> Any:
        linear, text = model.get_submodule(f"{keys[1]}.text_out"), kept["text"]
        streams = list(output)
        streams[place] = text + text @ linear.weight.T + linear.bias if key == keys[1] else text
        return tuple(streams)

    before = run(stock, inputs)
    with ExitStack() as stack:
        first = stock.get_submodule(blocks)[0]
        stack.callback(first.attn.register_forward_pre_hook(keep, with_kwargs=True).remove)
        for key in keys:
            block = stock.get_submodule(key)
            hooks = [
                block.attn.register_forward_pre_hook(partial(hand_over, key), with_kwargs=True),
                block.register_forward_pre_hook(enter, with_kwargs=True),
                block.register_forward_hook(partial(leave, key)),
            ]
            for hook in hooks:
                stack.callback(hook.remove)
        expected = run(stock, inputs)
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "MochiTransformer3DModel", "ZImageTransformer2DModel"])
def test_blocks_without_text_weights_of_their_own_have_no_linear_text(name: str) -> None:
    model = class_of(name)(**TEACHERS[name][0])
    assert not any(map(can_make_text_linear, model.get_submodule(list_of(name))))


def test_a_text_that_another_attention_reads_stays() -> None:
    name = full_name("MotifVideo")
    model = class_of(name)(**TEACHERS[name][0] | {"enable_text_cross_attention_dual": True})
    assert not any(map(can_make_text_linear, model.transformer_blocks))
