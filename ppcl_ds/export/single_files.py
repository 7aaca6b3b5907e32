"""A variant as one safetensors file with the tensor names that ComfyUI's loaders look for.

ComfyUI tells a model's family, and its number of blocks, from the names and shapes in the file:

- Qwen-Image: diffusers' own names, as they are.
- FLUX.1: the names of its first release, with queries, keys and values in one tensor, and shift before scale.
- SD3: its loader takes the number of blocks from the width, so a model that has lost blocks cannot be loaded. Refused.

Other families are refused until somebody has looked at how they are told apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.files import Source, Sources
from ppcl_ds.units.variant import Layout

_UNSEEN = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Qwen-Image's switches that later editions turn on, and that tensor names alone do not tell a loader."""

_FLUX_AROUND = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
_FLUX_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_FLUX_DOUBLE_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
_FLUX_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_FLUX_SINGLE_NORMS = {
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}


def single_file_tensors(layout: Layout) -> Sources:
    """The layout's tensors under the names that ComfyUI expects.

    Raises:
        UserError: this family cannot be written so; the message says why.
    """
    family = layout.config["_class_name"]
    if family == "QwenImageTransformer2DModel":
        switched = [key for key in _UNSEEN if layout.config.get(key)]
        if switched:
            raise UserError(f"--single-file: ComfyUI cannot tell from the file that this {family} has {switched[0]}")
        return layout.tensors
    if family == "FluxTransformer2DModel":
        return _flux(layout.tensors)
    if family == "SD3Transformer2DModel":
        raise UserError(
            "--single-file: ComfyUI takes the number of SD3's blocks from its width, so it cannot load an "
            f"{family} with fewer; use the transformer folder in diffusers"
        )
    raise UserError(f"--single-file: how ComfyUI names the tensors of {family} is not known here")


def _flux(tensors: Sources) -> Sources:
    named = dict(_flux_names(tensors))
    used = [name for origins in named.values() for name in origins]
    assert sorted(used) == sorted(tensors), "every tensor has exactly one place in the file"
    single = {new: _joined([tensors[name] for name in origins]) for new, origins in named.items()}
    for kind in ("weight", "bias"):
        new = f"final_layer.adaLN_modulation.1.{kind}"
        single[new] = Source(single[new].shape, single[new].dtype, partial(_halves_swapped, single[new]))
    return single


def _flux_names(tensors: Sources) -> Iterator[tuple[str, list[str]]]:
    """Name in the file -> names of the tensors that it is made of, laid one under the other."""
    parts: dict[str, tuple[str, ...]] = {"final_layer.adaLN_modulation.1": ("norm_out.linear",)}
    parts |= {new: (old,) for old, new in _FLUX_AROUND.items() if f"{old}.weight" in tensors}
    norms: dict[str, str] = {}
    for theirs, ours, linears, scales in (
        ("double_blocks", "transformer_blocks", _FLUX_DOUBLE, _FLUX_DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", _FLUX_SINGLE, _FLUX_SINGLE_NORMS),
    ):
        for number in sorted({int(name.split(".")[1]) for name in tensors if name.startswith(f"{ours}.")}):
            for new, old in linears.items():
                parts[f"{theirs}.{number}.{new}"] = tuple(f"{ours}.{number}.{each}" for each in old)
            norms |= {f"{theirs}.{number}.{new}": f"{ours}.{number}.{old}" for new, old in scales.items()}
    for kind in ("weight", "bias"):
        yield from ((f"{new}.{kind}", [f"{old}.{kind}" for old in origins]) for new, origins in parts.items())
    yield from ((new, [old]) for new, old in norms.items())


def _joined(sources: list[Source]) -> Source:
    """Tensors laid one under the other, as one."""
    if len(sources) == 1:
        return sources[0]
    rows = sum(source.shape[0] for source in sources)
    shape = torch.Size([rows, *sources[0].shape[1:]])
    return Source(shape, sources[0].dtype, lambda: torch.cat([source.load() for source in sources]))


def _halves_swapped(source: Source) -> Tensor:
    """Scale and shift as shift and scale: diffusers and the first release take them in opposite order."""
    first, second = source.load().chunk(2)
    return torch.cat([second, first])
