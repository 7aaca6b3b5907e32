"""Models without weights: real values stay, shapes are those of a whole model, and a trace tells computations apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppcl_ds.teacher.weightless import Trace, WithoutWeights

META = torch.device("meta")


class Small(nn.Module):
    """Two projections, a gain, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4))


def on_meta(module: nn.Module) -> Any:
    """The parameters on meta, buffers real."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to(META), requires_grad=False))
    return module


@pytest.fixture
def small() -> Any:
    return on_meta(Small())


# What runs, and what keeps its values


def test_what_inputs_alone_make_keeps_its_values(small: Any) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    with WithoutWeights():
        lengths = mask.sum(1)
        longest = int(lengths.max())
        positions = torch.arange(longest)
        hidden = small.a(torch.ones(2, longest, 4)) * mask[:, :longest, None]
    assert lengths.tolist() == [2, 1]
    assert positions.tolist() == [0, 1]
    assert hidden.is_meta
    assert hidden.shape == (2, 2, 4)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 2)),
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
        nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Flatten(1)),
        nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Dropout(0.5)),
    ],
    ids=["mlp", "attention", "convolution", "statistics"],
)
def test_a_model_on_meta_gives_the_shapes_of_a_whole_one(model: nn.Module) -> None:
    x = torch.randn(2, 3, 4)
    expected = model(x)
    empty = on_meta(copy.deepcopy(model))
    with WithoutWeights(), torch.no_grad():
        made = empty(x)
    assert made.is_meta
    assert (made.shape, made.dtype) == (expected.shape, expected.dtype)


def test_a_meta_tensor_says_that_it_is_on_the_cpu_but_only_inside(small: Any) -> None:
    with WithoutWeights():
        assert small.gain.device.type == "cpu"
        made = torch.ones(4, device=small.gain.device)
        moved = small.gain.to("cpu")
    assert small.gain.device.type == "meta"
    assert not made.is_meta
    assert moved.is_meta


def test_what_is_created_like_a_meta_tensor_is_one(small: Any) -> None:
    with WithoutWeights():
        assert small.gain.new_zeros(2).is_meta
        assert torch.zeros_like(small.gain).is_meta
        assert torch.zeros_like(small.table).tolist() == [[0.0] * 4] * 3


def test_a_real_mask_chooses_from_a_meta_tensor(small: Any) -> None:
    mask = torch.tensor([[True, False, True], [False, True, False]])
    with WithoutWeights():
        hidden = small.a(torch.ones(2, 3, 4))
        chosen = hidden[mask]
        both = hidden[mask.nonzero(as_tuple=True)]
        one = hidden[:, torch.tensor([True, False, True])]
    assert chosen.is_meta
    assert chosen.shape == both.shape == (3, 4)
    assert one.shape == (2, 2, 4)


def test_a_real_mask_says_where_meta_values_are_put(small: Any) -> None:
    mask = torch.tensor([True, False, True])
    with WithoutWeights():
        hidden = small.a(torch.ones(3, 4))
        hidden[mask] = small.b(torch.ones(2, 4))
    assert hidden.shape == (3, 4)


def test_meta_values_written_into_a_real_buffer_leave_it_as_it_was(small: Any) -> None:
    room = torch.zeros(3, 4)
    with WithoutWeights():
        room[:2] = small.a(torch.ones(2, 4))
        room[torch.tensor([True, False, True])] = small.a(torch.ones(2, 4))
        room.add_(small.gain)
    assert room.shape == (3, 4)


def test_values_that_are_not_there_are_zeros(small: Any) -> None:
    with WithoutWeights():
        hidden = small.a(torch.ones(2, 4))
        assert hidden.sum().item() == 0
        assert hidden.tolist() == [[0.0] * 4] * 2
        assert not (hidden > 0).any()
        assert int(hidden.sum()) == float(hidden.sum()) == 0
        assert list(range(hidden.long().sum())) == []
        chosen = (hidden > 0).nonzero()
    assert chosen.shape == (0, 2)


def test_a_fault_inside_leaves_nothing_behind(small: Any) -> None:
    with pytest.raises(RuntimeError, match="reduction dim"), WithoutWeights():
        small.a(torch.ones(2, 5))
    assert small.gain.device.type == "meta"
    assert torch.ones(2).sum() == 2


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_by_the_device_of_a_meta_tensor(small: Any, enabled: bool) -> None:
    """Models turn autocast off, or on, by `x.device.type`."""
    with WithoutWeights():
        hidden = small.a(torch.ones(2, 4))
        with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=enabled):
            made = small.b(hidden)
    assert made.is_meta
    assert made.shape == (2, 4)


# Names


def traced(make: Callable[[Any], Any], model: nn.Module | None = None, names: dict[str, str] | None = None) -> str:
    model = model if model is not None else on_meta(Small())
    with torch.no_grad(), Trace(model, names or {}) as trace:
        made = make(model)
    return trace.name(made)


def x() -> Tensor:
    return torch.arange(8.0).reshape(2, 4)


def masked(model: Any, values: list[bool]) -> Tensor:
    return model.a(x()) * torch.tensor(values)[:, None]


def written(model: Any, into: Callable[[Tensor, Tensor], Any]) -> Tensor:
    """What is written into a room of zeros, read as a whole."""
    room = torch.zeros(2, 4)
    into(room, model.a(x()))
    return room


def view_written(model: Any, write: bool) -> Tensor:
    """A view that was taken before its base is written."""
    base = model.a(x())
    view = base[:1]
    if write:
        base.mul_(2)
    return view


def base_written(model: Any, rows: slice) -> Tensor:
    """A base of which a view is written."""
    base = model.a(x())
    base[rows].mul_(2)
    return base


def row_read(model: Any, row: int) -> Tensor:
    """A row of a room, taken before the room is written."""
    room = torch.zeros(2, 4)
    rows = room[0], room[1]
    room.copy_(model.a(x()))
    return rows[row]


def gathered(model: Any, first: bool) -> Tensor:
    """Places chosen in two of three dimensions."""
    cube, places = model.a(x()).reshape(2, 2, 2), torch.tensor([0, 1])
    return cube[places, :, places] if first else cube[:, places, places]


COMPUTATIONS: dict[str, Callable[[Any], Tensor]] = {
    "a": lambda m: m.a(x()),
    "b": lambda m: m.b(x()),
    "other input": lambda m: m.a(x() + 1),
    "a then b": lambda m: m.b(m.a(x())),
    "b then a": lambda m: m.a(m.b(x())),
    "twice": lambda m: m.a(x()) * 2,
    "thrice": lambda m: m.a(x()) * 3,
    "difference": lambda m: m.a(x()) - m.b(x()),
    "other way round": lambda m: m.b(x()) - m.a(x()),
    "first of a pair": lambda m: m.a(x()).chunk(2, 1)[0],
    "second of a pair": lambda m: m.a(x()).chunk(2, 1)[1],
    "transposed": lambda m: m.a(x()).T.reshape(2, 4),
    "a mask": lambda m: masked(m, [True, False]),
    "another mask": lambda m: masked(m, [True, True]),
    "a row of a table": lambda m: m.a(x()) + m.table[1],
    "another row": lambda m: m.a(x()) + m.table[2],
    "chosen": lambda m: m.a(x())[torch.tensor([True, False])],
    "others chosen": lambda m: m.a(x())[torch.tensor([False, True])],
    "put": lambda m: written(m, lambda room, made: room.copy_(made)),
    "put twice": lambda m: written(m, lambda room, made: room.copy_(made).mul_(2)),
    "put in a row": lambda m: written(m, lambda room, made: room[:1].copy_(made[:1])),
    "put in another row": lambda m: written(m, lambda room, made: room[1:].copy_(made[:1])),
    "the first row read": lambda m: row_read(m, 0),
    "the second row read": lambda m: row_read(m, 1),
    "chosen in the first dimension": lambda m: gathered(m, True),
    "chosen in the second dimension": lambda m: gathered(m, False),
    "all but a constant": lambda m: torch.where(m.a(x()) > 0, m.a(x()), 1.0),
    "a constant but": lambda m: torch.where(m.a(x()) > 0, 1.0, m.a(x())),
    "at least": lambda m: m.a(x()).clamp(min=1.0),
    "at most": lambda m: m.a(x()).clamp(max=1.0),
    "put by a mask": lambda m: written(m, lambda r, made: r.__setitem__(torch.tensor([True, False]), made[:1])),
    "put by another mask": lambda m: written(m, lambda r, made: r.__setitem__(torch.tensor([False, True]), made[:1])),
    "a view of what is not written": lambda m: view_written(m, False),
    "a view of what is written": lambda m: view_written(m, True),
    "a base written in its first row": lambda m: base_written(m, slice(0, 1)),
    "a base written in its second row": lambda m: base_written(m, slice(1, 2)),
    "kept by keyword": lambda m: torch.sum(m.a(x()), dim=1, keepdim=True).expand(2, 4),
    "in another format": lambda m: m.a(x()).to(torch.bfloat16),
    "grouped norm": lambda m: torch.nn.functional.layer_norm(m.a(x()), (4,), eps=1e-5),
    "grouped norm, another epsilon": lambda m: torch.nn.functional.layer_norm(m.a(x()), (4,), eps=1e-6),
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_the_same_computation_has_the_same_name_in_another_model(name: str) -> None:
    assert traced(COMPUTATIONS[name]) == traced(COMPUTATIONS[name])


def test_no_two_other_computations_have_the_same_name() -> None:
    names = {name: traced(make) for name, make in COMPUTATIONS.items()}
    alike = {name: [other for other in names if names[other] == digest] for name, digest in names.items()}
    assert {name: others for name, others in alike.items() if len(others) > 1} == {}


def test_what_does_not_lie_on_the_way_does_not_matter() -> None:
    def busy(model: Any) -> Tensor:
        model.b(x()).mul_(2)
        torch.zeros(3).add_(1)
        return model.a(x())

    assert traced(busy) == traced(lambda m: m.a(x()))


def test_real_values_count_and_not_how_they_were_made() -> None:
    assert traced(lambda m: m.a(x() * 2)) == traced(lambda m: m.a(x() + x()))


def test_a_real_tensor_changed_in_place_is_another() -> None:
    def changed(model: Any, by: float) -> Tensor:
        given = x()
        model.a(given)
        given.add_(by)
        return model.a(given)

    assert traced(lambda m: changed(m, 1)) == traced(lambda m: m.a(x() + 1))
    assert traced(lambda m: changed(m, 1)) != traced(lambda m: changed(m, 2))


def test_names_of_parameters_count_and_can_be_others() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Linear(4, 4)

    own = on_meta(Renamed())
    assert traced(lambda m: m.c(x()), own) != traced(lambda m: m.a(x()))
    assert traced(lambda m: m.c(x()), own, {"c.weight": "a.weight", "c.bias": "a.bias"}) == traced(lambda m: m.a(x()))
    assert traced(lambda m: m.c(x()), own, {"c.weight": "b.weight", "c.bias": "a.bias"}) != traced(lambda m: m.a(x()))


def test_a_shorter_chain_is_the_longer_one_with_a_block_left_out() -> None:
    class Chain(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))

        def forward(self, hidden: Tensor, without: tuple[int, ...] = ()) -> Tensor:
            for place, block in enumerate(self.blocks):
                hidden = hidden if place in without else hidden + block(hidden)
            return hidden

    long, short = on_meta(Chain(3)), on_meta(Chain(2))
    names = {
        f"blocks.{new}.{key}": f"blocks.{old}.{key}" for new, old in ((0, 0), (1, 2)) for key in ("weight", "bias")
    }
    own = traced(lambda m: m(x()), short, names)
    assert own == traced(lambda m: m(x(), (1,)), long)
    assert own != traced(lambda m: m(x(), (2,)), long)
    assert own != traced(lambda m: m(x()), long)


def test_a_meta_tensor_from_elsewhere_has_no_name() -> None:
    made = torch.empty(2, device=META)
    with pytest.raises(KeyError), Trace(on_meta(Small()), {}) as trace:
        trace.name(made)


def test_an_empty_and_a_complex_tensor_have_names() -> None:
    rope = torch.polar(torch.ones(2, 2), torch.arange(4.0).reshape(2, 2))

    def turned(model: Any, by: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(model.a(x()).reshape(2, 2, 2)) * by).flatten(1)

    assert traced(lambda m: turned(m, rope)) == traced(lambda m: turned(m, rope.clone()))
    assert traced(lambda m: turned(m, rope)) != traced(lambda m: turned(m, rope.conj().resolve_conj()))
    assert traced(lambda m: turned(m, rope)) != traced(lambda m: turned(m, rope.conj()))
    assert traced(lambda m: torch.cat([torch.zeros(0, 4), m.a(x())])) != traced(lambda m: m.a(x()))
