"""Flows of hand-made transformers: which lists hand which streams on, where they break, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.flows import Flows, ListFlow, block_lists, learn_flows

WIDTH = 4


def learned(make: Callable[[], nn.Module], empty: bool = True, **arguments: Any) -> Flows:
    """Flows of a model, with parameters on the meta device or real ones."""
    with init_empty_weights(include_buffers=False) if empty else torch.no_grad():
        model = make().eval()
    image, text = torch.ones(2, 3, WIDTH), torch.ones(2, 5, WIDTH)
    return learn_flows(model, lambda model: model(image, text, **arguments))


class Block(nn.Module):
    """One stream, returned by itself or in a tuple."""

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.project, self.wrapped = nn.Linear(WIDTH, WIDTH), wrapped

    def forward(self, hidden_states: Tensor, scale: Tensor | None = None) -> Any:
        made = hidden_states + self.project(hidden_states)
        return (made,) if self.wrapped else made


class Double(nn.Module):
    """Two streams, returned in either order."""

    def __init__(self, text_first: bool) -> None:
        super().__init__()
        self.image, self.text, self.text_first = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), text_first

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor | None = None) -> Any:
        image, text = self.image(hidden_states), self.text(encoder_hidden_states)
        return (text, image) if self.text_first else (image, text)


class Chain(nn.Module):
    """A model of one list called `blocks`, between two projections."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        hidden = self.into(image)
        for place, block in enumerate(self.blocks):
            hidden = self.between(place, self.run(block, hidden, text))
        return self.out(hidden)

    def run(self, block: nn.Module, hidden: Tensor, text: Tensor) -> Any:
        made = block(hidden)
        return made[0] if isinstance(made, tuple) else made

    def between(self, place: int, hidden: Any) -> Any:
        return hidden


# Streams


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize(("wrapped", "outputs"), [(False, 0), (True, 1)])
def test_one_stream(wrapped: bool, outputs: int, empty: bool) -> None:
    flows = learned(lambda: Chain(*(Block(wrapped) for _ in range(4))), empty)
    assert flows == [ListFlow("blocks", {"image": "hidden_states"}, {"image": 0}, outputs)]


@pytest.mark.parametrize("text_first", [True, False])
def test_two_streams_in_either_order(text_first: bool) -> None:
    class Model(Chain):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            hidden = self.into(image)
            for block in self.blocks:
                made = block(encoder_hidden_states=text, hidden_states=hidden)
                text, hidden = made if text_first else made[::-1]
            return self.out(hidden)

    [flow] = learned(lambda: Model(*(Double(text_first) for _ in range(3))))
    assert flow.reads == {"image": "hidden_states", "text": "encoder_hidden_states"}
    assert list(flow.reads) == ["image", "text"]
    assert flow.returns == {"image": 1, "text": 0} if text_first else {"image": 0, "text": 1}
    assert flow.outputs == 2
    assert not flow.breaks
    assert not flow.skips


def test_streams_of_other_names_are_called_as_their_arguments() -> None:
    class Third(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, audio: Tensor, time: Tensor) -> Any:
            return self.project(audio), self.project(x), time

    class Model(Chain):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            time = torch.ones(2)
            for block in self.blocks:
                text, image, _ = block(image, text, time)
            return self.out(image)

    [flow] = learned(lambda: Model(*(Third() for _ in range(3))))
    assert dict(flow.reads) | {"audio": "audio"} == flow.reads
    assert flow.reads["image"] == "x"
    assert (flow.returns["image"], flow.returns["audio"]) == (1, 0)
    assert flow.outputs == 3


def test_the_text_that_only_comes_in_is_no_stream() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return hidden_states + self.project(encoder_hidden_states).mean(1, keepdim=True)

    class Model(Chain):
        def run(self, block: nn.Module, hidden: Tensor, text: Tensor) -> Any:
            return block(hidden, text)

    [flow] = learned(lambda: Model(*(Cross() for _ in range(3))))
    assert flow.reads == {"image": "hidden_states"}


# Breaks


def test_a_break_where_something_is_added_between_two_blocks() -> None:
    class Model(Chain):
        def between(self, place: int, hidden: Tensor) -> Tensor:
            return hidden + 1 if place == 1 else hidden

    [flow] = learned(lambda: Model(*(Block() for _ in range(5))))
    assert flow.breaks == {1}


def test_a_break_where_something_is_added_in_place() -> None:
    """The tensor that is read is the one that was returned, but not what it was."""

    class Model(Chain):
        def between(self, place: int, hidden: Tensor) -> Tensor:
            return hidden.add_(1) if place == 1 else hidden

    [flow] = learned(lambda: Model(*(Block() for _ in range(5))))
    assert flow.breaks == {1}


def test_no_break_where_blocks_write_into_what_they_read() -> None:
    class Writing(Block):
        def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
            return hidden_states.add_(1) + self.project(hidden_states)

    [flow] = learned(lambda: Chain(*(Writing() for _ in range(4))))
    assert not flow.breaks


def test_breaks_where_one_of_two_streams_is_changed() -> None:
    class Model(Chain):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            for place, block in enumerate(self.blocks):
                image, text = block(image, text)
                text = text * 2 if place == 2 else text
            return self.out(image)

    [flow] = learned(lambda: Model(*(Double(False) for _ in range(5))))
    assert list(flow.reads) == ["image", "text"]
    assert flow.breaks == {2}


def test_a_break_where_a_block_also_returns_what_is_changed_before_the_next_reads_it() -> None:
    class Hinted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden_states: Tensor, hint: Tensor) -> Any:
            return self.project(hidden_states), self.project(hint)

    class Model(Chain):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            hint = image
            for block in self.blocks:
                image, hint = block(image, hint)
                hint = hint * 2
            return self.out(image)

    [flow] = learned(lambda: Model(*(Hinted() for _ in range(4))))
    assert flow.reads == {"image": "hidden_states"}
    assert flow.outputs == 2
    assert {0, 1, 2} <= flow.breaks, "between no two blocks is the hint handed straight on"


def test_a_list_all_of_whose_blocks_are_followed_by_something_hands_nothing_on() -> None:
    class Model(Chain):
        def between(self, place: int, hidden: Tensor) -> Tensor:
            return hidden * 2

    with pytest.raises(UserError, match="no list of blocks"):
        learned(lambda: Model(*(Block() for _ in range(4))))


def test_skips() -> None:
    class Mirror(Block):
        def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
            return super().forward(hidden_states if skip is None else hidden_states + skip)

    class Model(Chain):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            left: list[Tensor] = []
            for place, block in enumerate(self.blocks):
                image = block(image, left.pop() if place > 2 else None)
                left.append(image)
                if place > 2:
                    left.pop()
            return self.out(image)

    [flow] = learned(lambda: Model(*(Mirror() for _ in range(5))))
    assert flow.skips
    assert flow.reads == {"image": "hidden_states"}
    assert not flow.breaks


# Lists


def test_lists_inside_blocks_are_parts_of_them() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, hidden_states: Tensor) -> Tensor:
            for layer in self.layers:
                hidden_states = layer(hidden_states)
            return hidden_states

    def make() -> nn.Module:
        return Chain(Deep(), Deep())

    assert [flow.name for flow in learned(make)] == ["blocks"]
    assert list(block_lists(make())) == ["blocks"]


def test_lists_of_a_dictionary() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mode_blocks = nn.ModuleDict(
                {name: nn.ModuleList(Block() for _ in range(3)) for name in ("video", "image", "unused")}
            )

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            for name in ("image", "video"):
                blocks: Any = self.mode_blocks[name]
                for block in blocks:
                    image = block(image)
                image = image * 2
            return image

    flows = learned(Model)
    assert [flow.name for flow in flows] == ["mode_blocks.image", "mode_blocks.video"]
    assert set(block_lists(Model())) == {"mode_blocks.video", "mode_blocks.image", "mode_blocks.unused"}


def test_lists_come_in_the_order_in_which_they_run() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.later = nn.ModuleList(Block(wrapped=True) for _ in range(3))
            self.single = nn.ModuleList([Block()])
            self.first = nn.ModuleList(Double(True) for _ in range(2))

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            for block in self.first:
                text, image = block(image, text)
            image = self.single[0](torch.cat([text, image], 1))
            for block in self.later:
                (image,) = block(image)
            return image

    flows = learned(Model)
    assert [(flow.name, flow.outputs) for flow in flows] == [("first", 2), ("later", 1)]


def test_a_list_that_runs_twice_is_none_of_blocks() -> None:
    class Model(Chain):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            return super().forward(super().forward(image, text), text)

    with pytest.raises(UserError, match="no list of blocks"):
        learned(lambda: Model(*(Block() for _ in range(3))))


def test_a_list_that_runs_backwards_is_none_of_blocks() -> None:
    class Model(Chain):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            for block in reversed(self.blocks):
                image = block(image)
            return image

    with pytest.raises(UserError, match="no list of blocks"):
        learned(lambda: Model(*(Block() for _ in range(3))))


def test_two_lists_that_run_by_turns_are_refused() -> None:
    """Latte: a spatial block, a temporal one, and so on; between two of a list stands always one of the other."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spatial, self.temporal = (nn.ModuleList(Block() for _ in range(3)) for _ in range(2))

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            for one, other in zip(self.spatial, self.temporal, strict=True):
                image = other(one(image))
            return image

    with pytest.raises(UserError, match="Model has no list of blocks"):
        learned(Model)


# Models that do not run


def test_a_model_that_cannot_run_is_told_of_in_one_line() -> None:
    class Model(Chain):
        def between(self, place: int, hidden: Tensor) -> Tensor:
            raise RuntimeError("such a size\n  is unheard of")

    with pytest.raises(UserError) as refused:
        learned(lambda: Model(*(Block() for _ in range(3))))
    assert str(refused.value) == "Model cannot be run without its weights (such a size is unheard of)"


def test_a_list_whose_modules_return_no_tensors_is_none_of_blocks() -> None:
    class Silent(nn.Module):
        def forward(self, hidden_states: Tensor) -> None:
            return None

    class Model(Chain):
        def __init__(self) -> None:
            super().__init__(Block(), Block())
            self.watchers = nn.ModuleList([Silent(), Silent()])

        def between(self, place: int, hidden: Tensor) -> Tensor:
            self.watchers[place](hidden)
            return hidden

    assert [flow.name for flow in learned(Model)] == ["blocks"]


def test_what_the_caller_says_to_a_person_is_said_as_it_is() -> None:
    def run(model: nn.Module) -> None:
        raise UserError("no such family")

    with pytest.raises(UserError, match=r"^no such family$"):
        learn_flows(Chain(Block(), Block()), run)


def test_nothing_stays_on_the_blocks() -> None:
    model = Chain(Block(), Block())
    with pytest.raises(UserError):
        learn_flows(model, lambda model: model(torch.ones(2, 3, WIDTH + 1), None))
    learn_flows(model, lambda model: model(torch.ones(2, 3, WIDTH), None))
    assert not any(block._forward_hooks for block in model.blocks)
    assert not model(torch.ones(1, 1, WIDTH), None).is_meta
