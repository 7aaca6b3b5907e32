"""Diffusion transformers some of whose blocks have lost parts: linears stand in for text streams and feed-forwards.

This file stands alone. A copy of it travels in the folder of every model that needs it, so that diffusers loads the
model where nothing but diffusers is installed (`trust_remote_code=True`). Blocks are the stock ones, and run the stock
forward; what is gone is replaced inside them. Four configuration keys say what:

    linear_text   blocks whose attention reads `text_in` of the modulated text of the last block before them that is
                  not listed; their own text parts are gone, and the text stream passes through them unchanged
    text_jumps    of those, the blocks after which the text stream moves on by `text_out`
    narrow_ffn    feed-forward part -> hidden channels that are left; 0: one linear
    plain_ffn     feed-forward parts that are added to their stream without modulation and gate

Blocks are named as in a state dict, such as `transformer_blocks.7`, and parts such as `transformer_blocks.7.img_mlp`.
Shapes: B batch, S text tokens, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin  # noqa: F401 - beside a class that a pipeline is given, diffusers looks for its base
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import Tensor, nn


class ResidualLinear(nn.Linear):
    """`x + W x + b`; nothing but `x` before it is trained."""

    def __init__(self, channels: int, **placed: Any) -> None:
        super().__init__(channels, channels, **placed)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def narrow_ffn(ffn: Any, hidden: int) -> Any:
    """A smaller feed-forward in the place of a stock one, its weights not yet chosen.

    Args:
        ffn: diffusers' `FeedForward`, of an activation without a gate of its own.
        hidden: its hidden channels; 0: a linear, which puts out zeros until it is trained.

    Raises:
        ValueError: the activation is gated.
    """
    inner, outer = ffn.net[0].proj, ffn.net[2]
    if inner.out_features != outer.in_features:
        raise ValueError("a feed-forward with a gated activation cannot be narrowed")
    placed = {"device": inner.weight.device, "dtype": inner.weight.dtype}
    if not hidden:
        linear = nn.Linear(inner.in_features, outer.out_features, **placed)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear
    ffn.net[0].proj = nn.Linear(inner.in_features, hidden, inner.bias is not None, **placed)
    ffn.net[2] = nn.Linear(hidden, outer.out_features, outer.bias is not None, **placed)
    return ffn


class ModulatedText:
    """Carries the modulated text of one block, (B, S, C), to the blocks that read a linear of it."""

    def __init__(self) -> None:
        self.text: Tensor | None = None

    def keep(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the attention of the block that has it."""
        self.text = kwargs["encoder_hidden_states"]

    def hand_over(self, block: Any, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the attention of a block that reads it."""
        assert self.text is not None, "the block that has the text runs first"
        return args, kwargs | {"encoder_hidden_states": block.text_in(self.text)}


def _jump(block: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Behind a block: the text stream moves on."""
    text, image = output
    return block.text_out(text), image


class _ZeroModulation(nn.Module):
    """In the place of a modulation: shifts, scales and gates are all zero, so that nothing is added to the stream."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding.new_zeros(*embedding.shape[:-1], self.channels)


class _ZeroFeedForward(nn.Module):
    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return torch.zeros_like(x)


class _ZeroAdaLayerNorm(nn.Module):
    """In the place of an `AdaLayerNormZero`: four gates, shifts and scales of zero beside the stream."""

    def forward(self, x: Tensor, *args: Any, emb: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        return x, *(emb.new_zeros(emb.shape[0], x.shape[-1]),) * 4


class _First(nn.Module):
    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return x


def _idle(part: Any) -> nn.Module:
    """What takes the place of a part that only served the text stream."""
    if isinstance(part, nn.Sequential):
        modulation: Any = part[-1]
        return _ZeroModulation(modulation.out_features)
    for kind, idle in ((FeedForward, _ZeroFeedForward), (AdaLayerNormZero, _ZeroAdaLayerNorm)):
        if isinstance(part, kind):
            return idle()
    if isinstance(part, (AdaLayerNormContinuous, nn.Linear)):
        return _First()
    raise ValueError(f"the text stream of a block with a {type(part).__name__} cannot become linear")


def serves_text(name: str) -> bool:
    """Whether a part of a block serves its text stream, as diffusers names such parts."""
    return "txt" in name or "context" in name


def text_parts(block: Any) -> list[str]:
    """Names of the parts of a block with parameters that serve its text stream alone."""
    own = [name for name, part in block.named_children() if serves_text(name)]
    own += ["attn.to_add_out"] if getattr(block.attn, "to_add_out", None) is not None else []
    return [name for name in own if next(block.get_submodule(name).parameters(), None) is not None]


def make_text_linear(block: Any, source: ModulatedText, jump: bool) -> None:
    """Have a block's attention read a linear of a text that comes from another block, and take its text parts away.

    Args:
        source: carries the modulated text of the block that has it.
        jump: whether the text stream moves on after this block.
    """
    weight = block.attn.add_k_proj.weight
    for name in text_parts(block):
        block.set_submodule(name, _idle(block.get_submodule(name)))
    block.text_in = ResidualLinear(weight.shape[1], device=weight.device, dtype=weight.dtype)
    block.attn.register_forward_pre_hook(partial(source.hand_over, block), with_kwargs=True)
    if jump:
        block.text_out = ResidualLinear(weight.shape[1], device=weight.device, dtype=weight.dtype)
        block.register_forward_hook(_jump)


class _HalfModulation(nn.Sequential):
    """A block's modulation of which only attention's half is left; the feed-forward is neither scaled nor gated."""

    def forward(self, embedding: Tensor) -> Tensor:
        attention = super().forward(embedding)  # shift, scale, gate: (B, 3 C)
        neutral = attention.new_zeros(*attention.shape[:-1], attention.shape[-1] // 3)
        return torch.cat([attention, neutral, neutral, neutral + 1], dim=-1)


def _make_plain(block: Any, ffn: str) -> None:
    """Qwen-Image alone: parts of a stream are `img_mod`, `img_norm2`, `img_mlp`, and so on."""
    stream = ffn.removesuffix("_mlp")
    silu, linear = getattr(block, f"{stream}_mod")
    placed = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    half = nn.Linear(linear.in_features, linear.out_features // 2, **placed)
    setattr(block, f"{stream}_mod", _HalfModulation(silu, half))
    setattr(block, f"{stream}_norm2", nn.Identity())


def prune(
    model: Any,
    linear_text: Sequence[str],
    text_jumps: Sequence[str],
    narrow_ffn_: Mapping[str, int],
    plain_ffn: Sequence[str],
) -> None:
    """Take the parts that the four configuration keys name out of a stock model."""
    for part in plain_ffn:
        name, _, ffn = part.rpartition(".")
        _make_plain(model.get_submodule(name), ffn)
    for part, hidden in narrow_ffn_.items():
        model.set_submodule(part, narrow_ffn(model.get_submodule(part), hidden))
    for names in {name.rpartition(".")[0]: None for name in linear_text}:
        source = None
        for place, block in enumerate(model.get_submodule(names)):
            name = f"{names}.{place}"
            if name not in linear_text:
                source = ModulatedText()
                if f"{names}.{place + 1}" in linear_text:
                    block.attn.register_forward_pre_hook(source.keep, with_kwargs=True)
                continue
            if source is None:
                raise ValueError(f"linear_text: no block comes before {name} whose text it could read")
            make_text_linear(block, source, name in text_jumps)


_OPTIONS: dict[str, Any] = {"linear_text": (), "text_jumps": (), "narrow_ffn": {}, "plain_ffn": ()}


def _pruned(stock: Any) -> Any:
    """A stock class that also takes the four configuration keys."""
    signature = inspect.signature(stock.__init__)
    # `auto_map` tells diffusers' AutoModel of this file; a key that no parameter is called after would be warned about.
    names = [*_OPTIONS, "auto_map"]
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - of the class that is made below
        pruned = {name: kwargs.pop(name, None) or default for name, default in _OPTIONS.items()}
        known = {"auto_map": kwargs.pop("auto_map", None)}
        stock.__init__(self, *args, **kwargs)
        self.register_to_config(**pruned, **{name: value for name, value in known.items() if value})
        prune(self, *pruned.values())

    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])  # type: ignore[attr-defined]
    about = f"diffusers' `{stock.__name__}` without the parts that its configuration names."
    return type(f"Pruned{stock.__name__}", (stock,), {"__init__": __init__, "__doc__": about})


PrunedQwenImageTransformer2DModel = _pruned(diffusers.QwenImageTransformer2DModel)
PrunedFluxTransformer2DModel = _pruned(diffusers.FluxTransformer2DModel)
PrunedSD3Transformer2DModel = _pruned(diffusers.SD3Transformer2DModel)
