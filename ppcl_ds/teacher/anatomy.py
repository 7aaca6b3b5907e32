"""The anatomy of a teacher: its block lists, the streams that cross its boundaries, and taps that record them.

Which argument and which output of a block is which stream was learned from one forward (`flows.py`).
Shapes: B batch, S tokens of a stream, C channels, M blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppcl_ds.teacher.flows import IMAGE, Flows, arguments_of
from ppcl_ds.teacher.modeling_pruned import can_make_text_linear, ffn_parts, serves_text, text_parts

ATTENTION = "attn"
"""Name of the part of a block in which image and text attend to each other, in every family that has text parts."""

ATTENDED_TEXT = "encoder_hidden_states"
"""Its argument that is the text, normed and modulated."""

Streams = dict[str, Tensor]
"""Stream name (`image`, `text`, others as their argument) -> (B, S, C)."""


Shapes = dict[str, torch.Size]
"""Name -> shape of every tensor of a module."""


def block_shapes(module: nn.Module) -> Shapes:
    """Name -> shape of every tensor in a block's state dict."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


@dataclass(frozen=True)
class Block:
    """One block of the teacher.

    Boundaries are numbered along the execution. Inside one block list, what leaves a block enters the next: one
    boundary. Where the teacher does something to its streams before the next block reads them, as between two lists,
    what leaves has a boundary of its own; so with a single list and nothing of that kind, boundary b is what enters
    block b and boundary M is what leaves the last.

    Attributes:
        index: number among all blocks, 0..M-1.
        list_name: the block's list in the model, such as `transformer_blocks`.
        position: number inside its list.
        last: whether it closes its list.
        closes: whether no span may go on behind it: it is the last, or the teacher changes a stream there.
        entering, leaving: boundary numbers.
        reads: stream -> name of the argument that carries it.
        returns: stream -> place in the returned tuple.
        outputs: length of that tuple; 0: one tensor by itself.
        parameters: number of parameters.
        ffn: stream -> name of the feed-forward part that serves it; a block that fuses it with attention has none.
        text_only: names of the parts that serve the text stream alone, and so are idle once attention is handed the
            text ready modulated. Empty where the text is not a stream of its own inside the block.
        text_channels: of the text that attention reads; 0 where it is not a stream of its own.
    """

    index: int
    list_name: str
    position: int
    last: bool
    closes: bool
    entering: int
    leaving: int
    reads: Mapping[str, str]
    returns: Mapping[str, int]
    outputs: int
    parameters: int
    ffn: Mapping[str, str]
    text_only: Sequence[str]
    text_channels: int

    @property
    def key(self) -> str:
        """Prefix of the block's tensors in a state dict."""
        return f"{self.list_name}.{self.position}"

    def split_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Streams, dict]:
        """Separate the streams of a call from its other arguments (conditioning: time, RoPE, masks)."""
        bound = arguments_of(module, args, kwargs)
        streams = {stream: bound.pop(name) for stream, name in self.reads.items()}
        return streams, bound

    def call(self, module: nn.Module, streams: Streams, conditioning: dict[str, Any]) -> Streams:
        """Call a block of this class on streams of your choice; streams it does not return are left out."""
        inputs = {name: streams[stream] for stream, name in self.reads.items()}
        return self.read_output(module(**inputs, **conditioning))

    def read_output(self, output: Any) -> Streams:
        if isinstance(output, Tensor):
            return {IMAGE: output}
        return {s: output[place] for s, place in self.returns.items() if output[place] is not None}

    def write_output(self, streams: Streams) -> Any:
        """The inverse of `read_output`, as the teacher's own forward expects it."""
        if not self.outputs:
            return streams[IMAGE]
        output: list[Tensor | None] = [None] * self.outputs
        for stream, place in self.returns.items():
            output[place] = streams.get(stream)
        return tuple(output)


class Tap(NamedTuple):
    """What is wanted of the calls of a part of a block.

    Attributes:
        block: its number.
        part: name of the part inside it.
        pick: from the call's arguments, keyword arguments and output, the tensors to record.
    """

    block: int
    part: str
    pick: Callable[[tuple[Any, ...], dict[str, Any], Any], tuple[Tensor, ...]]


@dataclass
class Capture:
    """What was recorded in one forward.

    Attributes:
        streams: boundary -> its streams.
        conditioning: block index -> its arguments other than the streams (tensors shared between blocks stay shared).
        parts: what was asked of the calls of parts of blocks, see `Tap`.
        output: of the whole model, if the forward went to its end.
    """

    streams: dict[int, Streams] = field(default_factory=dict)
    conditioning: dict[int, dict[str, Any]] = field(default_factory=dict)
    parts: dict[Tap, tuple[Tensor, ...]] = field(default_factory=dict)
    output: Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """What a forward is run for; after the last wanted block it ends.

    Attributes:
        calls: blocks whose arguments are wanted, the streams that enter them included.
        exits: blocks whose leaving streams are wanted.
        parts: what is wanted of parts of blocks.
        to_the_end: whether the velocity is wanted, too; the forward does not end before its end.
    """

    calls: frozenset[int]
    exits: frozenset[int]
    parts: frozenset[Tap] = frozenset()
    to_the_end: bool = False

    @property
    def last(self) -> int:
        return max(self.calls | self.exits | {tap.block for tap in self.parts})

    def union(self, other: Wanted) -> Wanted:
        to_the_end = self.to_the_end or other.to_the_end
        return Wanted(self.calls | other.calls, self.exits | other.exits, self.parts | other.parts, to_the_end)


class Anatomy:
    """The blocks of a diffusers transformer, in execution order (weights are not needed: meta models will do).

    Args:
        model: of the class that `flows` were learned from; it may have fewer blocks.
    """

    def __init__(self, model: nn.Module, flows: Flows) -> None:
        self.flows = flows
        blocks: list[Block] = []
        boundary = 0
        for flow in flows:
            modules: Any = model.get_submodule(flow.name)
            reads, returns = dict(flow.reads), dict(flow.returns)
            for position, module in enumerate(modules):
                text_only, channels = _text_of(module) if "text" in reads else ((), 0)
                last = position == len(modules) - 1
                blocks.append(
                    Block(
                        index=len(blocks),
                        list_name=flow.name,
                        position=position,
                        last=last,
                        closes=last or position in flow.breaks,
                        entering=boundary,
                        leaving=boundary + 1,
                        reads=reads,
                        returns=returns,
                        outputs=flow.outputs,
                        parameters=sum(p.numel() for p in module.parameters()),
                        ffn=_ffn_of(module, reads),
                        text_only=text_only,
                        text_channels=channels,
                    )
                )
                boundary += 2 if blocks[-1].closes else 1
        self.blocks: Sequence[Block] = tuple(blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def block_parameters(self) -> int:
        return sum(block.parameters for block in self.blocks)

    @property
    def runs(self) -> Sequence[Sequence[Block]]:
        """The blocks, cut where no span may go on."""
        found: list[list[Block]] = [[]]
        for block in self.blocks:
            found[-1].append(block)
            if block.closes:
                found.append([])
        return found[:-1]

    def module(self, model: nn.Module, block: Block) -> nn.Module:
        return model.get_submodule(block.key)

    @contextmanager
    def record(self, model: nn.Module, wanted: Wanted | None = None) -> Iterator[Capture]:
        """Record what crosses the boundaries in the forwards run inside; references, not copies.

        The model's own forward runs unchanged. Without `wanted` it runs to its end and every boundary and every block's
        arguments are recorded; with it, the rest is not held, and the forward ends after the last wanted block and
        returns one empty tensor.
        """
        capture = Capture()
        everything = range(len(self))
        calls, exits = (wanted.calls, wanted.exits) if wanted else (everything, everything)
        with ExitStack() as stack:
            stack.enter_context(self.tap(model, capture, wanted.parts if wanted else ()))
            stops = wanted is not None and not wanted.to_the_end
            for block in self.blocks:
                module = self.module(model, block)
                if block.index in calls:
                    before = partial(_record_call, capture, block)
                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                if block.index in exits:
                    stack.callback(module.register_forward_hook(partial(_record_exit, capture, block)).remove)
                if wanted and stops and block.index == wanted.last:
                    # The last hook of the block: a sharded block has freed its parameters by then.
                    stack.callback(module.register_forward_hook(_stop).remove)
            if stops:
                model.forward = partial(_until_stopped, model.forward)
                stack.callback(delattr, model, "forward")
            yield capture

    @contextmanager
    def bypassed(self, model: nn.Module, removed: Collection[int]) -> Iterator[None]:
        """Inside, the blocks `removed` hand on what enters them."""
        with ExitStack() as stack:
            for block in (self.blocks[index] for index in removed):
                module = self.module(model, block)
                module.forward = partial(_hand_on, block, module)
                stack.callback(delattr, module, "forward")
            yield

    @contextmanager
    def tap(self, model: nn.Module, capture: Capture, taps: Iterable[Tap]) -> Iterator[None]:
        """Record, into `capture`, what is wanted of parts of blocks in the forwards run inside."""
        with ExitStack() as stack:
            for tap in taps:
                part = self.module(model, self.blocks[tap.block]).get_submodule(tap.part)
                hook = partial(_record_part, capture, tap)
                stack.callback(part.register_forward_hook(hook, with_kwargs=True).remove)
            yield


def _hand_on(block: Block, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block.write_output(block.split_call(module, args, kwargs)[0])


def _record_call(capture: Capture, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict) -> None:
    capture.streams[block.entering], capture.conditioning[block.index] = block.split_call(module, args, kwargs)


def _record_exit(capture: Capture, block: Block, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    capture.streams[block.leaving] = block.read_output(output)


def _record_part(
    capture: Capture, tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict, output: Any
) -> None:
    picked = tap.pick(args, kwargs, output)
    if before := capture.parts.get(tap):  # a part that serves two streams: the tokens of one, then those of the other
        picked = tuple(torch.cat(pair, 1) for pair in zip(before, picked, strict=True))
    capture.parts[tap] = picked


class EarlyExit(Exception):  # noqa: N818 - not an error
    """The forward has come as far as it is needed: raised by a hook on a block, caught around the forward."""


def _stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    raise EarlyExit


def _until_stopped(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The root's forward; caught here, inside the root's call, so that the root's own hooks run as ever."""
    try:
        return forward(*args, **kwargs)
    except EarlyExit:
        return (torch.empty(0),)


def _ffn_of(module: nn.Module, reads: Mapping[str, str]) -> dict[str, str]:
    """Stream -> its feed-forward part; one that serves no stream that the block reads is left out."""
    parts: dict[str, str] = {}
    for name in ffn_parts(module):
        parts.setdefault(stream_served(name, reads), name)
    return {stream: name for stream, name in parts.items() if stream in reads}


def stream_served(part: str, reads: Mapping[str, str]) -> str:
    """The stream of a feed-forward part by its name: `audio_ff` is of a stream whose name begins like `audio`."""
    words = part.replace(".", "_").split("_")
    if serves_text(part) or words[-1] == "t":
        return "text"
    others = [stream for stream in reads if stream not in ("image", "text")]
    own = (stream for stream in others if any(word.startswith(stream.split("_")[0]) for word in words))
    return next(own, "audio" if "audio" in words else "image")


def _text_of(module: Any) -> tuple[tuple[str, ...], int]:
    """The parts that serve the text alone, and its channels; none where it could not do without them."""
    if not can_make_text_linear(module):
        return (), 0
    return tuple(text_parts(module)), getattr(module, ATTENTION).add_k_proj.in_features
