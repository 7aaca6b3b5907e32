"""Diffusion transformers some of whose blocks have lost parts: linears stand in for text streams and feed-forwards.

This file stands alone. A copy of it travels in the folder of every model that needs it, so that diffusers loads the
model where nothing but diffusers is installed (`trust_remote_code=True`). Blocks are the stock ones, and run the stock
forward; what is gone is replaced inside them. Of any transformer class X of diffusers, `PrunedX` is the one that also
takes these configuration keys, which say what is gone:

    linear_text   blocks whose attention reads `text_in` of the modulated text of the last block before them that is
                  not listed; their own text parts are gone, and the text stream passes through them unchanged
    text_jumps    of those, the blocks after which the text stream moves on by `text_out`
    text_place    place of the text stream in what a block returns
    narrow_ffn    feed-forward part -> hidden channels that are left; 0: one linear
    plain_ffn     feed-forward parts that are added to their stream without modulation and gate
    modulation    of Chroma, whose blocks are modulated by rows of a table, the rows that those which are left read

Blocks are named as in a state dict, such as `transformer_blocks.7`, and parts such as `transformer_blocks.7.img_mlp`.
Shapes: B batch, S text tokens, C channels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import ModelMixin  # has to be a name of this file: diffusers looks for it beside a class of a pipeline
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import Tensor, nn
from torch.func import functional_call


class ResidualLinear(nn.Linear):
    """`x + W x + b`; nothing but `x` before it is trained."""

    def __init__(self, channels: int, **placed: Any) -> None:
        super().__init__(channels, channels, **placed)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class FFN(NamedTuple):
    """The linears of a feed-forward part, by their names inside it; H hidden channels.

    Attributes:
        ups: those that read what the part reads. One, or two of which one gates the other, channel by channel.
        down: the one that reads the hidden channels.
        fused: whether the only one of `ups` puts out value and gate, one after the other: 2 H channels.
    """

    ups: tuple[str, ...]
    down: str
    fused: bool

    def rows(self, channels: Tensor, hidden: int) -> Tensor:
        """The rows of `ups` that make hidden channels, given by their numbers; there are `hidden` of them in all."""
        return torch.cat([channels, channels + hidden]) if self.fused else channels


_NAMES = ("ff", "ffn", "mlp", "feed_forward")
"""How diffusers calls feed-forward parts, or begins or ends their names: `ff_context`, `img_mlp`."""


def ffn_parts(block: nn.Module) -> list[str]:
    """Names of the feed-forward parts of a block; those that are also held one level down, as by a wrapper, count."""
    held = {name: child for name, child in block.named_children() if not _is_ffn(name, child)}
    below = {f"{name}.{inner}": part for name, child in held.items() for inner, part in child.named_children()}
    parts = dict(block.named_children()) | below
    return [name for name, part in parts.items() if _is_ffn(name.rpartition(".")[2], part)]


def _is_ffn(name: str, part: nn.Module) -> bool:
    named = name.startswith(tuple(f"{each}_" for each in _NAMES)) or name.endswith(_NAMES)
    return named and sum(parameter.dim() > 1 for parameter in part.parameters()) > 1


def read_ffn(part: Any) -> FFN:
    """The structure of a feed-forward part, whatever its class; its forward is followed without its weights.

    Raises:
        ValueError: it is of another make; the message goes on from the part's name.
    """
    if any(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for module in part.modules()):
        raise ValueError("is convolutional; only depth units can replace it")
    if _is_mixture(part):
        raise ValueError("is a mixture of experts, which cannot be narrowed")
    linears = {name: module for name, module in part.named_modules() if isinstance(module, nn.Linear)}
    known = sum(len(list(linear.parameters())) for linear in linears.values())
    if len(linears) < 2 or known < len(list(part.parameters())):
        raise ValueError("does not consist of two or three linears")
    first = next(iter(linears.values()))
    x = torch.empty(1, 1, first.in_features, device="meta", dtype=first.weight.dtype)
    reads = _followed(part, linears, x)
    ups = tuple(name for name in linears if reads.get(name) is x)
    downs = [name for name in linears if name in reads and name not in ups]
    if len(reads) < len(linears) or len(downs) != 1:
        raise ValueError("does not go up and down once")
    hidden, channels = linears[downs[0]].in_features, linears[downs[0]].out_features
    if channels != first.in_features:
        raise ValueError(f"reads {first.in_features} channels and puts out {channels}")
    widths = [linears[name].out_features for name in ups]
    if widths not in ([hidden], [2 * hidden], [hidden, hidden]):
        raise ValueError(f"goes up to {widths} channels and down from {hidden}")
    return FFN(ups, downs[0], widths == [2 * hidden])


def _is_mixture(part: Any) -> bool:
    """Whether a part holds experts: feed-forwards one beside the other, or their weights as one tensor."""
    lists = [inner for inner in part.modules() if isinstance(inner, nn.ModuleList) and len(inner)]
    return any(_is_ffn("ff", inner[0]) for inner in lists) or any(
        parameter.dim() > 2 for parameter in part.parameters()
    )


def _followed(part: Any, linears: Mapping[str, nn.Linear], x: Tensor) -> dict[str, Tensor]:
    """What each linear of a part reads when the part reads `x`, on the meta device."""
    reads: dict[str, Tensor] = {}

    def note(name: str, linear: nn.Module, args: tuple[Any, ...]) -> None:
        reads[name] = args[0]

    handles = [linear.register_forward_pre_hook(partial(note, name)) for name, linear in linears.items()]
    try:
        with torch.no_grad():
            functional_call(part, {name: tensor.to("meta") for name, tensor in part.state_dict().items()}, (x,))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        raise ValueError("cannot be followed from a single input") from None
    finally:
        for handle in handles:
            handle.remove()
    return reads


def narrow_ffn(part: Any, hidden: int) -> Any:
    """A smaller feed-forward to take the place of another one, its weights not yet chosen.

    Args:
        part: a feed-forward; it stays as it is.
        hidden: hidden channels of the smaller one, which is of the same class; 0: a linear, which puts out zeros until
            it is trained.

    Raises:
        ValueError: it is of a make that cannot become so; the message goes on from the part's name.
    """
    if not hidden:
        return _linear_for(part)
    found = read_ffn(part)
    # Whatever stands in deepcopy's memo is taken and not copied, so no weights are.
    taken = {}
    for name in (*found.ups, found.down):
        stock = part.get_submodule(name)
        inward, outward = (hidden, stock.out_features) if name == found.down else (stock.in_features, hidden)
        doubled = outward * 2 if found.fused and name != found.down else outward
        taken[id(stock)] = nn.Linear(inward, doubled, stock.bias is not None, **_placed(stock))
    return copy.deepcopy(part, taken)


def _placed(linear: Any) -> dict[str, Any]:
    return {"device": linear.weight.device, "dtype": linear.weight.dtype}


class _LinearAlone(nn.Linear):
    """In the place of a part that reads more than its stream: what it does not need."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(input)


def _linear_for(part: Any) -> nn.Linear:
    """A linear of zeros in the place of a feed-forward, or of a mixture of those."""
    whole, found = _tokenwise(part)
    up, down = whole.get_submodule(found.ups[0]), whole.get_submodule(found.down)
    reads = [each for each in inspect.signature(part.forward).parameters.values() if each.kind < each.VAR_POSITIONAL]
    linear = (nn.Linear if len(reads) == 1 else _LinearAlone)(up.in_features, down.out_features, **_placed(up))
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _tokenwise(part: Any) -> tuple[Any, FFN]:
    """A part, or a feed-forward inside it: a mixture of experts reads and puts out what each of them does.

    Raises:
        ValueError: there is none; says what `part` is.
    """
    for inner in part.modules() if _is_mixture(part) else ():
        with suppress(ValueError):
            return inner, read_ffn(inner)
    return part, read_ffn(part)


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


def _jump(place: int, block: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Behind a block: the text stream moves on."""
    streams = list(output)
    streams[place] = block.text_out(streams[place])
    return tuple(streams)


class _ZeroModulation(nn.Module):
    """In the place of a modulation: shifts, scales and gates are all zero, so that nothing is added to the stream."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding.new_zeros(*embedding.shape[:-1], self.channels)


class _Nothing(nn.Module):
    """In the place of what is added to the stream: zeros, of so many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.channels)


class _ZeroAdaLayerNorm(nn.Module):
    """In the place of an `AdaLayerNormZero`: four gates, shifts and scales of zero beside the stream."""

    def forward(self, x: Tensor, *args: Any, emb: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        return x, *(emb.new_zeros(emb.shape[0], x.shape[-1]),) * 4


class _First(nn.Module):
    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return x


def _idle(part: Any) -> nn.Module:
    """What takes the place of a part that only served the text stream.

    Raises:
        ValueError: nothing is known that could.
    """
    try:
        return _Nothing(part.get_submodule(read_ffn(part).down).out_features)
    except ValueError:
        pass
    if isinstance(part, nn.Sequential):
        modulation: Any = part[-1]
        return _ZeroModulation(modulation.out_features)
    if isinstance(part, nn.Linear):  # behind attention; there need not be a gate in the block that closes
        return _Nothing(part.out_features)
    if isinstance(part, AdaLayerNormZero):
        return _ZeroAdaLayerNorm()
    if isinstance(part, AdaLayerNormContinuous):
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


def can_make_text_linear(block: Any) -> bool:
    """Whether `make_text_linear` can: attention has weights of its own for the text, and nobody else reads it."""
    if (
        getattr(getattr(block, "attn", None), "add_k_proj", None) is None
        or getattr(block, "cross_attn", None) is not None
    ):
        return False
    try:
        for name in text_parts(block):
            _idle(block.get_submodule(name))
    except ValueError:
        return False
    return True


def make_text_linear(block: Any, source: ModulatedText, jump: bool, place: int = 0) -> None:
    """Have a block's attention read a linear of a text that comes from another block, and take its text parts away.

    Args:
        source: carries the modulated text of the block that has it.
        jump: whether the text stream moves on after this block.
        place: of the text stream in what the block returns.
    """
    weight = block.attn.add_k_proj.weight
    for name in text_parts(block):
        block.set_submodule(name, _idle(block.get_submodule(name)))
    block.text_in = ResidualLinear(weight.shape[1], device=weight.device, dtype=weight.dtype)
    block.attn.register_forward_pre_hook(partial(source.hand_over, block), with_kwargs=True)
    if jump:
        block.text_out = ResidualLinear(weight.shape[1], device=weight.device, dtype=weight.dtype)
        block.register_forward_hook(partial(_jump, place))


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


def _keep_modulation(embedding: Any, rows: Sequence[int]) -> None:
    """Chroma alone: its table is made of an embedding of the numbers of its rows."""
    channels = embedding.mod_proj.shape[1] // 2
    whole = type(embedding)(num_channels=channels, out_dim=max(rows) + 1)
    embedding.mod_proj = whole.mod_proj[list(rows)]


def prune(
    model: Any,
    linear_text: Sequence[str],
    text_jumps: Sequence[str],
    narrow_ffn_: Mapping[str, int],
    plain_ffn: Sequence[str],
    text_place: int,
    modulation: Sequence[int],
) -> None:
    """Take the parts that the configuration keys name out of a stock model."""
    if modulation:
        _keep_modulation(model.time_text_embed, modulation)
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
            make_text_linear(block, source, name in text_jumps, text_place)


_OPTIONS: dict[str, Any] = {
    "linear_text": (),
    "text_jumps": (),
    "narrow_ffn": {},
    "plain_ffn": (),
    "text_place": 0,
    "modulation": (),
}


def _pruned(stock: Any) -> Any:
    """A stock class that also takes the configuration keys."""
    signature = inspect.signature(stock.__init__)
    # `auto_map` tells diffusers' AutoModel of this file; a key that no parameter is called after would be warned about.
    names = [*_OPTIONS, "auto_map"]
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    parameters = sorted([*signature.parameters.values(), *own], key=lambda parameter: parameter.kind)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - of the class that is made below
        pruned = {name: kwargs.pop(name, None) or default for name, default in _OPTIONS.items()}
        known = {"auto_map": kwargs.pop("auto_map", None)}
        stock.__init__(self, *args, **kwargs)
        self.register_to_config(**pruned, **{name: value for name, value in known.items() if value})
        prune(self, *pruned.values())

    __init__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    about = f"diffusers' `{stock.__name__}` without the parts that its configuration names."
    return type(f"Pruned{stock.__name__}", (stock,), {"__init__": __init__, "__doc__": about})


def __getattr__(name: str) -> Any:
    """`PrunedX` of diffusers' X, made when it is first asked for."""
    stock = getattr(diffusers, name.removeprefix("Pruned"), None) if name.startswith("Pruned") else None
    if not (isinstance(stock, type) and issubclass(stock, ModelMixin)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _pruned(stock))
