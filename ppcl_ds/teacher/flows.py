"""Which lists of blocks a transformer runs, and which tensors flow from block to block: read off one forward.

The very tensor that a block returns is an argument of the next. So no table says, for a class, what its streams are.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_ds.errors import UserError, brief
from ppcl_ds.teacher.weightless import WithoutWeights

Run = Callable[[nn.Module], Any]
"""Calls a transformer once, on real arguments of your choice."""

IMAGE, TEXT = "image", "text"
_TEXT_ARGUMENT = "encoder_hidden_states"


@dataclass(frozen=True)
class ListFlow:
    """A list of blocks that hand their streams straight on.

    Attributes:
        name: of the list in the model, such as `transformer_blocks` or `mode_blocks.image`.
        reads: stream -> name of the argument that carries it. The first is `image`, the one that comes in as
            `encoder_hidden_states` beside it is `text`, others are called as their argument.
        returns: stream -> its place in what a block returns.
        outputs: how many things a block returns in a tuple; 0: one tensor by itself.
        breaks: positions after which the model does something to what a block returns before the next one reads it.
        skips: whether a block also reads what a block before the last one returned.
    """

    name: str
    reads: Mapping[str, str]
    returns: Mapping[str, int]
    outputs: int = 0
    breaks: frozenset[int] = frozenset()
    skips: bool = False


Flows = Sequence[ListFlow]
"""In the order in which the lists run."""


@dataclass(frozen=True, eq=False)
class _Call:
    """A block's call: its arguments by name, what it returned, and its number among all calls.

    Of tensors also how often each had been written in place: of arguments before the call, of what it returned after.
    """

    arguments: Mapping[str, Any]
    entered: Mapping[str, int]
    output: Any
    left: Sequence[int]
    order: int

    @property
    def places(self) -> Sequence[Any]:
        return _places(self.output)


def _places(output: Any) -> Sequence[Any]:
    """What a block returned, in a tuple."""
    return output if isinstance(output, (tuple, list)) else (output,)


def _times_written(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def arguments_of(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name, as a hook with keywords is given them."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return {name: value for name, value in bound.items() if name != "self"}


def learn_flows(model: nn.Module, run: Run) -> Flows:
    """The block lists of a transformer.

    Args:
        model: with parameters on the meta device, or a whole one.
        run: runs it once.

    Raises:
        UserError: no list hands what its blocks return straight on.
    """
    lists = {name: modules for name, modules in block_lists(model).items() if len(modules) > 1}
    try:
        calls = _recorded(model, [block for blocks in lists.values() for block in blocks], run)
    except UserError:
        raise
    except Exception as fault:  # whatever a model makes of tensors without values
        raise UserError(f"{type(model).__name__} cannot be run without its weights ({brief(fault)})") from None
    found = [
        flow
        for name, blocks in lists.items()
        if all(len(calls.get(block, ())) == 1 for block in blocks)
        and (flow := _flow_of(name, blocks, [calls[block][0] for block in blocks]))
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no list of blocks each of which hands what it returns straight on to the next"
        )
    return sorted(found, key=lambda flow: calls[lists[flow.name][0]][0].order)


def block_lists(model: nn.Module) -> Mapping[str, Sequence[nn.Module]]:
    """All lists of modules of a model that may be lists of blocks: name -> modules."""
    return {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _is_outermost(model, name)
    }


@torch.no_grad()
def _recorded(model: nn.Module, blocks: Sequence[nn.Module], run: Run) -> Mapping[nn.Module, list[_Call]]:
    """All calls of the blocks in one forward."""
    calls: dict[nn.Module, list[_Call]] = {}
    entered: dict[nn.Module, dict[str, int]] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[module] = {name: _times_written(value) for name, value in arguments_of(module, args, kwargs).items()}

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        left = [_times_written(value) for value in _places(output)]
        order = sum(map(len, calls.values()))
        call = _Call(arguments_of(module, args, kwargs), entered[module], output, left, order)
        calls.setdefault(module, []).append(call)

    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave, with_kwargs=True).remove)
        with WithoutWeights():
            run(model)
    return calls


def _is_outermost(model: nn.Module, name: str) -> bool:
    """Whether nothing but containers stands around a list: those inside blocks and embedders are parts of them."""
    above = [model.get_submodule(name[:at]) for at in range(len(name)) if name[at] == "."]
    return all(isinstance(module, (nn.ModuleList, nn.ModuleDict)) for module in above)


def _flow_of(name: str, blocks: Sequence[nn.Module], calls: Sequence[_Call]) -> ListFlow | None:
    """The streams that flow between neighbours; None where nothing does."""
    handed = [frozenset(_handed_on(one, other)) for one, other in pairwise(calls)]
    usual = Counter(pairs for pairs in handed if pairs).most_common(1)
    if not usual or sorted(calls, key=lambda call: call.order) != list(calls):
        return None
    [(pairs, _)] = usual
    parameters = list(inspect.signature(type(blocks[0]).forward).parameters)
    ordered = sorted(pairs, key=lambda pair: parameters.index(pair[1]))
    first = next((pair for pair in ordered if pair[1] == "hidden_states"), ordered[0])
    names = {pair: _stream_called(pair, first) for pair in [first, *(pair for pair in ordered if pair != first)]}
    output = calls[0].output
    return ListFlow(
        name,
        reads={stream: argument for (_, argument), stream in names.items()},
        returns={stream: place for (place, _), stream in names.items()},
        outputs=0 if isinstance(output, Tensor) else len(output),
        breaks=frozenset(
            place for place, own in enumerate(handed) if _is_more(calls[place], pairs) or not pairs <= own
        ),
        skips=any(any(_read_again(one, later)) for place, one in enumerate(calls) for later in calls[place + 2 :]),
    )


def _handed_on(one: _Call, other: _Call) -> Iterator[tuple[int, str]]:
    """Of `_read_again`, those that nobody wrote into in between."""
    return (pair for pair in _read_again(one, other) if one.left[pair[0]] == other.entered[pair[1]])


def _read_again(one: _Call, other: _Call) -> Iterator[tuple[int, str]]:
    """(place in what one block returns, argument of another that is this very tensor)."""
    for place, tensor in enumerate(one.places):
        for argument, value in other.arguments.items():
            if isinstance(tensor, Tensor) and value is tensor:
                yield place, argument


def _is_more(call: _Call, pairs: frozenset[tuple[int, str]]) -> bool:
    """Whether a block also returns a tensor that the next one does not read as it is."""
    streams = {place for place, _ in pairs}
    return any(isinstance(tensor, Tensor) and place not in streams for place, tensor in enumerate(call.places))


def _stream_called(pair: tuple[int, str], first: tuple[int, str]) -> str:
    if pair == first:
        return IMAGE
    return TEXT if pair[1] == _TEXT_ARGUMENT else pair[1]
