"""Feed-forwards of every make that diffusers has are read, narrowed and solved by their structure, or refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ppcl_ds.distill.least_squares import settle
from ppcl_ds.probing.linear import Moments
from ppcl_ds.teacher.anatomy import Capture, Tap, _ffn_of, _record_part
from ppcl_ds.teacher.modeling_pruned import ffn_parts, narrow_ffn, read_ffn
from ppcl_ds.units.ffn import FFNKind, FFNUnit, _check_gate, read_and_returned
from ppcl_ds.units.plan import UnitPlan

CHANNELS, TOKENS = 8, 40


def stock(place: str) -> Any:
    """A class of diffusers by its module in `diffusers.models` and its name; skips where this release has none."""
    module, _, name = place.rpartition(".")
    try:
        return getattr(importlib.import_module(f"diffusers.models.{module}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this diffusers has no {name}")


@dataclass(frozen=True)
class Make:
    """A make of feed-forward, written out.

    Attributes:
        place: of its class.
        arguments: of its class.
        value, gate: names of the linears that make the hidden channels; `gate` may be the second half of `value`
            (`+`) or its first (`-`), or nothing.
        down: name of the linear that reads them.
        act: on the gate, or on the value where there is none.
    """

    place: str
    arguments: dict[str, Any]
    value: str
    gate: str
    down: str
    act: Callable[[Tensor], Tensor] = F.silu

    def part(self) -> Any:
        torch.manual_seed(0)
        return stock(self.place)(**self.arguments).eval().requires_grad_(False)

    def hidden(self, part: Any, x: Tensor, channels: Tensor) -> Tensor:
        """Some of the hidden channels, (N, K), from the weights alone."""
        value, gate = self._rows(part)
        if gate is None:
            return self.act(_affine(x, value, channels))
        return self.act(_affine(x, gate, channels)) * _affine(x, value, channels)

    def _rows(self, part: Any) -> tuple[Any, Any]:
        linear = part.get_submodule(self.value)
        if self.gate not in ("+", "-"):
            return _weights(linear), _weights(part.get_submodule(self.gate)) if self.gate else None
        halves = list(zip(*(([None] * 2) if each is None else each.chunk(2) for each in _weights(linear)), strict=True))
        return (halves[0], halves[1]) if self.gate == "+" else (halves[1], halves[0])


def _weights(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias


def _affine(x: Tensor, weights: tuple[Tensor, Tensor | None], rows: Tensor) -> Tensor:
    weight, bias = weights
    return x @ weight[rows].T + (0 if bias is None else bias[rows])


def classic(activation: str, gate: str, act: Callable[[Tensor], Tensor], **others: Any) -> Make:
    arguments = {"dim": CHANNELS, "inner_dim": 20, "activation_fn": activation} | others
    return Make("attention.FeedForward", arguments, "net.0.proj", gate, "net.2", act)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


W, COSMOS, T = {"dim": CHANNELS, "hidden_dim": 20}, "transformers.transformer_cosmos3.Cosmos3VLTextMLP", "transformers"
MAKES = {
    "gelu": classic("gelu", "", F.gelu),
    "Qwen-Image, FLUX, SD3, Wan": classic("gelu-approximate", "", tanh_gelu),
    "quick gelu": classic("geglu-approximate", "", lambda x: x * torch.sigmoid(1.702 * x)),
    "linear-silu": classic("linear-silu", "", F.silu),
    "Stable Audio": classic("geglu", "+", F.gelu, final_dropout=True),
    "Mochi, Ovis": classic("swiglu", "+", F.silu, bias=False),
    "as wide as the stream": classic("swiglu", "+", F.silu, inner_dim=CHANNELS),
    "Kandinsky 5": Make(
        f"{T}.transformer_kandinsky.Kandinsky5FeedForward",
        {"dim": CHANNELS, "ff_dim": 20},
        "in_layer",
        "",
        "out_layer",
        F.gelu,
    ),
    "LongCat-Audio": Make(
        f"{T}.transformer_longcat_audio_dit.AudioDiTFeedForward", {"dim": CHANNELS}, "ff.0", "", "ff.3", tanh_gelu
    ),
    "AuraFlow": Make(
        f"{T}.auraflow_transformer_2d.AuraFlowFeedForward", {"dim": CHANNELS}, "linear_2", "linear_1", "out_projection"
    ),
    "Z-Image": Make(f"{T}.transformer_z_image.FeedForward", W, "w3", "w1", "w2"),
    "FIBO 2": Make(f"{T}.transformer_bria_fibo2.FeedForward", W, "w3", "w1", "w2"),
    "Ideogram 4": Make(f"{T}.transformer_ideogram4.Ideogram4MLP", W, "w3", "w1", "w2"),
    "HiDream": Make(
        f"{T}.transformer_hidream_image.HiDreamImageFeedForwardSwiGLU", W | {"multiple_of": 4}, "w3", "w1", "w2"
    ),
    "Lumina": Make(
        "attention.LuminaFeedForward",
        {"dim": CHANNELS, "inner_dim": 20, "multiple_of": 4},
        "linear_3",
        "linear_1",
        "linear_2",
    ),
    "Krea 2": Make(f"{T}.transformer_krea2.Krea2SwiGLU", W, "up", "gate", "down"),
    "Krea 2, square": Make(
        f"{T}.transformer_krea2.Krea2SwiGLU", {"dim": CHANNELS, "hidden_dim": CHANNELS}, "up", "gate", "down"
    ),
    "ACE-Step": Make(
        f"{T}.ace_step_transformer.AceStepMLP",
        {"hidden_size": CHANNELS, "intermediate_size": 20},
        "up_proj",
        "gate_proj",
        "down_proj",
    ),
    "ERNIE-Image": Make(
        f"{T}.transformer_ernie_image.ErnieImageFeedForward",
        {"hidden_size": CHANNELS, "ffn_hidden_size": 20},
        "up_proj",
        "gate_proj",
        "linear_fc2",
        F.gelu,
    ),
    "Cosmos 3": Make(COSMOS, {"hidden_size": CHANNELS, "intermediate_size": 20}, "up_proj", "gate_proj", "down_proj"),
    "Cosmos 3 without a gate": Make(
        COSMOS,
        {"hidden_size": CHANNELS, "intermediate_size": 20, "hidden_act": "relu2"},
        "up_proj",
        "",
        "down_proj",
        lambda x: x.relu() ** 2,
    ),
    "Qwen-Image 2.1": Make(
        f"{T}.transformer_qwenimage21.QwenImage21SwiGLUFeedForward",
        {"hidden_size": CHANNELS, "mlp_hidden_size": 20},
        "proj",
        "gate_layer",
        "out",
    ),
    "Qwen-Image 2.1, square": Make(
        f"{T}.transformer_qwenimage21.QwenImage21SwiGLUFeedForward",
        {"hidden_size": CHANNELS, "mlp_hidden_size": CHANNELS},
        "proj",
        "gate_layer",
        "out",
    ),
    "FLUX.2": Make(f"{T}.transformer_flux2.Flux2FeedForward", {"dim": CHANNELS}, "linear_in", "-", "linear_out"),
    "FLUX.2 with biases": Make(
        f"{T}.transformer_flux2.Flux2FeedForward", {"dim": CHANNELS, "bias": True}, "linear_in", "-", "linear_out"
    ),
    "FLUX.3": Make(f"{T}.transformer_flux3.Flux3FeedForward", {"dim": CHANNELS}, "linear_in", "-", "linear_out"),
    "OmniGen": Make(
        f"{T}.transformer_omnigen.OmniGenFeedForward",
        {"hidden_size": CHANNELS, "intermediate_size": 20},
        "gate_up_proj",
        "-",
        "down_proj",
    ),
    "Stable Audio 3": Make(
        f"{T}.transformer_stable_audio3.StableAudio3FeedForward", {"dim": CHANNELS}, "proj_in", "+", "proj_out"
    ),
}


@pytest.fixture(params=MAKES, ids=lambda name: name)
def make(request: pytest.FixtureRequest) -> Make:
    return MAKES[request.param]


def tokens() -> Tensor:
    return torch.randn(2, TOKENS // 2, CHANNELS, generator=torch.Generator().manual_seed(1))


def test_its_linears_are_told_apart(make: Make) -> None:
    found = read_ffn(make.part())
    gate = {make.gate} - {"", "+", "-"}
    assert set(found.ups) == {make.value} | gate
    assert found.down == make.down
    assert found.fused == (make.gate in ("+", "-"))


@torch.no_grad()
def test_with_all_channels_it_is_the_same_to_the_bit(make: Make) -> None:
    part = make.part()
    unit = FFNUnit({"image": make.part()}, keep=0.999, dtype=torch.float32)
    assert list(unit.parts["image"].state_dict()) == list(part.state_dict())
    assert torch.equal(unit.compute("image", tokens()), part(tokens()))


@torch.no_grad()
def test_with_some_channels_it_is_what_they_compute_by_hand(make: Make) -> None:
    part, x = make.part(), tokens()
    unit = FFNUnit({"image": make.part()}, keep=0.25, dtype=torch.float32)
    down = part.get_submodule(make.down)
    count = unit.undecided["image"]
    assert count == round(down.in_features / 4)
    channels = torch.randperm(down.in_features, generator=torch.Generator().manual_seed(2))[:count].sort().values
    unit.choose("image", channels)
    assert type(unit.parts["image"]) is type(part)
    expected = make.hidden(part, x, channels) @ down.weight[:, channels].T
    expected = expected + (0 if down.bias is None else down.bias)
    torch.testing.assert_close(unit.compute("image", x), expected, rtol=1e-5, atol=1e-6)
    assert part.get_submodule(make.down).in_features > count, "the teacher's own is left as it was"


@torch.no_grad()
def test_a_channel_is_as_important_as_what_the_output_loses_with_it(make: Make) -> None:
    part, x = make.part(), tokens().flatten(0, 1)
    unit = FFNUnit({"image": make.part()}, keep=0.25, dtype=torch.float32)
    every = torch.arange(part.get_submodule(make.down).in_features)
    hidden, weight = make.hidden(part, x, every).double(), part.get_submodule(make.down).weight.double()
    lost = [torch.outer(hidden[:, k], weight[:, k]).square().sum() for k in every]
    torch.testing.assert_close(unit.importance("image", x), torch.stack(lost), rtol=1e-4, atol=1e-9)


@torch.no_grad()
def test_the_down_projection_is_solved_like_numpy_solves_it(make: Make) -> None:
    part, x = make.part(), tokens()
    unit = FFNUnit({"image": make.part()}, keep=0.25, dtype=torch.float32)
    [regression] = unit.regressions({"image": x}, {"image": part(x)})
    h, y = (each.flatten(0, 1).double() for each in (regression.x, regression.y))
    settle(regression.linear, Moments(h.T @ h, h.T @ y, h.sum(0), y.sum(0), len(h)), ridge=0.0)
    linear = unit.parts["image"].get_submodule(make.down)
    assert regression.linear is linear
    constant = np.ones((len(h), int(linear.bias is not None)))
    solution, *_ = np.linalg.lstsq(np.concatenate([h.numpy(), constant], 1), y.numpy(), rcond=None)
    own = linear.weight.T if linear.bias is None else torch.cat([linear.weight.T, linear.bias[None]])
    expected = np.concatenate([h.numpy(), constant], 1) @ solution
    found = np.concatenate([h.numpy(), constant], 1) @ own.double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_without_channels_it_is_one_linear(make: Make) -> None:
    linear = narrow_ffn(make.part(), 0)
    assert type(linear) is nn.Linear
    assert not any(parameter.any() for parameter in linear.parameters())
    assert linear(tokens()).shape == tokens().shape


def test_on_the_meta_device_nothing_is_read(make: Make) -> None:
    part = make.part().to("meta")
    assert {p.device.type for p in narrow_ffn(part, 3).parameters()} == {"meta"}


def sana() -> Any:
    return stock("transformers.sana_transformer.GLUMBConv")(CHANNELS, CHANNELS)


def small() -> nn.Module:
    return FeedForward(CHANNELS, mult=2, activation_fn="gelu")


def block(**parts: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def moe_hidream() -> Any:
    return stock("transformers.transformer_hidream_image.MOEFeedForwardSwiGLU")(CHANNELS, 16, 2, 1)


def moe_nucleus() -> Any:
    return stock("transformers.transformer_nucleusmoe_image.NucleusMoELayer")(CHANNELS, 16, 2, 2.0, True, 1.0)


@pytest.mark.parametrize("mixture", [moe_hidream, moe_nucleus])
def test_a_mixture_of_experts_becomes_a_linear_or_nothing(mixture: Callable[[], Any]) -> None:
    part = mixture()
    with pytest.raises(ValueError, match="is a mixture of experts, which cannot be narrowed"):
        narrow_ffn(part, 4)
    linear = narrow_ffn(part, 0)
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (CHANNELS, CHANNELS)


def test_a_linear_leaves_out_what_else_the_mixture_read() -> None:
    x = tokens()
    time = torch.zeros(2, CHANNELS)
    assert not narrow_ffn(moe_nucleus(), 0)(x, x, timestep=time).any()


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(CHANNELS, 16), nn.LayerNorm(16), nn.Linear(16, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


class _Deep(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(CHANNELS, 16), nn.Linear(16, 16), nn.Linear(16, CHANNELS))


class _Widening(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(CHANNELS, 16), nn.GELU(), nn.Linear(16, 2 * CHANNELS))


REFUSED = {
    "Sana": (sana, "is convolutional"),
    "SanaVideo": (lambda: stock("transformers.transformer_sana_video.GLUMBTempConv")(CHANNELS, CHANNELS), "is convol"),
    "normed inside": (_Normed, "does not consist of two or three linears"),
    "three in a row": (_Deep, "does not go up and down once"),
    "another width": (_Widening, "reads 8 channels and puts out 16"),
    "a feed-forward and a linear": (
        lambda: nn.Sequential(small(), nn.Linear(CHANNELS, 9)),
        "does not go up and down once",
    ),
    "one linear": (lambda: nn.Linear(CHANNELS, CHANNELS), "does not consist of two or three linears"),
}


@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replaced_is_refused_with_a_reason(name: str, hidden: int) -> None:
    part, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        narrow_ffn(part(), hidden)


class _Interleaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(CHANNELS, 32), nn.Linear(16, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(F.silu(x[..., ::2]) * x[..., 1::2])


def test_a_gate_that_is_no_half_is_noticed(make: Make) -> None:
    _check_gate(make.part())
    _check_gate(make.part().to("meta"))
    with pytest.raises(ValueError, match="in another way"):
        _check_gate(_Interleaved())


PROBLEMS: list[tuple[Callable[[], Any], float, str]] = [
    (sana, 0.0, "feed-forward 'ff' of block 0 is convolutional; only depth units can replace it"),
    (moe_hidream, 0.5, "feed-forward 'ff' of block 0 is a mixture of experts, which cannot be narrowed"),
    (moe_hidream, 0.0, ""),
    (moe_nucleus, 0.0, ""),
    (_Interleaved, 0.0, ""),
    (_Interleaved, 0.5, "feed-forward 'ff' of block 0 is gated in another way than half by half"),
    (small, 0.5, ""),
]


@pytest.mark.parametrize(("part", "keep", "reason"), PROBLEMS)
def test_a_plan_is_told_what_a_block_cannot_have_and_why(part: Callable[[], Any], keep: float, reason: str) -> None:
    made, unit = block(ff=part()), UnitPlan(name="it", kind="ffn", span=(0, 0), streams=("image",), keep=keep)
    teacher: Any = SimpleNamespace(blocks=[SimpleNamespace(index=0, ffn=_ffn_of(made, IMAGE))], module=lambda _: made)
    found = FFNKind().problem(unit, teacher)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


IMAGE = {"image": "hidden_states"}
TEXT = IMAGE | {"text": "encoder_hidden_states"}
SERVED: dict[str, tuple[tuple[str, ...], dict[str, str], dict[str, str]]] = {
    "Qwen-Image": (("img_mlp", "txt_mlp"), TEXT, {"image": "img_mlp", "text": "txt_mlp"}),
    "FLUX": (("ff", "ff_context"), TEXT, {"image": "ff", "text": "ff_context"}),
    "FLUX, text unread": (("ff", "ff_context"), IMAGE, {"image": "ff"}),
    "Z-Image": (("feed_forward",), IMAGE, {"image": "feed_forward"}),
    "LTX-2": (
        ("ff", "audio_ff"),
        IMAGE | {"audio_hidden_states": "audio_hidden_states"},
        {"image": "ff", "audio_hidden_states": "audio_ff"},
    ),
    "LTX-2, audio first": (("audio_ff", "ff"), IMAGE | {"audio": "a"}, {"image": "ff", "audio": "audio_ff"}),
    "LTX-2, no audio": (("audio_ff", "ff"), IMAGE, {"image": "ff"}),
    "Cosmos 3": (("mlp", "mlp_moe_gen"), {"image": "u", "gen_seq": "g"}, {"image": "mlp", "gen_seq": "mlp_moe_gen"}),
}


@pytest.mark.parametrize("family", SERVED)
def test_each_stream_has_its_own_part(family: str) -> None:
    names, reads, expected = SERVED[family]
    norms = {"ffn_norm1": nn.LayerNorm(CHANNELS), "proj_mlp": nn.Linear(CHANNELS, CHANNELS)}
    assert _ffn_of(block(**{name: small() for name in names}, **norms), reads) == expected


def test_parts_one_level_down_are_found() -> None:
    wrapped = block(block=block(ff_i=moe_hidream(), ff_t=small()))
    assert _ffn_of(wrapped, TEXT) == {"image": "block.ff_i", "text": "block.ff_t"}
    fused = block(video_dec_block=block(feed_forward=small()), audio_dec_block=block(feed_forward=small()))
    assert _ffn_of(fused, {"image": "vis", "aud": "aud"}) == {
        "image": "video_dec_block.feed_forward",
        "aud": "audio_dec_block.feed_forward",
    }
    assert ffn_parts(block(ff_in=nn.Linear(8, 16), ff_out=nn.Linear(16, 8))) == [], "no part of their own"


def test_a_part_that_two_streams_share_is_seen_with_both() -> None:
    """CogView4 and GLM-Image call one feed-forward for the image and then for the text."""
    capture, tap, part = Capture(), Tap(0, "ff", read_and_returned), small()
    image, text = torch.randn(2, 6, CHANNELS), torch.randn(2, 3, CHANNELS)
    for x in (image, text):
        _record_part(capture, tap, part, (x,), {}, part(x))
    read, returned = capture.parts[tap]
    assert torch.equal(read, torch.cat([image, text], 1))
    assert torch.equal(returned, torch.cat([part(image), part(text)], 1))


@pytest.mark.parametrize("shape", [(6, CHANNELS), (2, 6, CHANNELS), (2, 1, 2, 3, CHANNELS)])
def test_whatever_the_layout_tokens_are_read(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    read, returned = read_and_returned((x,), {}, -x)
    assert read.shape == (1 if len(shape) == 2 else 2, 6, CHANNELS)
    assert torch.equal(read.reshape(shape), x)
    assert torch.equal(returned, -read)
