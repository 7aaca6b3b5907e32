"""Feed-forward units: a feed-forward part of one block as a linear, or with fewer hidden channels.

Shapes: B batch, S tokens, C channels, H hidden channels, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_ds.teacher.anatomy import Anatomy, Block, Capture, Streams, Tap, Wanted
from ppcl_ds.teacher.files import Sources
from ppcl_ds.teacher.modeling_pruned import narrow_ffn, read_ffn
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plugging import replace_forward
from ppcl_ds.units.spec import Export, Kind, Part, UnitPlan
from ppcl_ds.units.unit import Regression, Unit, UnitBatch, WidthUnit, count_parameters


class FFNUnit(WidthUnit):
    """Feed-forward parts of one block: each a linear, or with fewer hidden channels.

    Which hidden channels stay is decided by `choose`, before training; until then they are the first ones.

    Args:
        parts: the teacher's own feed-forward of each stream; it is kept until channels have been chosen.
        keep: share of the hidden channels that stay; 0: one linear takes the place of all.

    Raises:
        ValueError: a feed-forward is of a make that cannot become so.
    """

    def __init__(self, parts: Mapping[str, Any], keep: float, dtype: torch.dtype) -> None:
        hidden = {stream: hidden_channels(part, keep) for stream, part in parts.items()}
        super().__init__({s: narrow_ffn(part, hidden[s]).to(dtype) for s, part in parts.items()})
        self.whole: dict[str, Any] = {stream: part.float() for stream, part in parts.items() if hidden[stream]}
        """Of what is narrowed: the teacher's own feed-forward, until channels have been chosen. Not trained."""
        for stream in self.whole:
            self.choose(stream, torch.arange(hidden[stream]))

    def forward(self, inputs: Streams, conditioning: dict[str, Any]) -> Streams:
        return {stream: self.compute(stream, inputs[stream]) for stream in self.parts}

    def free_calibration(self) -> None:
        """Free the teacher's feed-forwards."""
        self.whole = {}

    @property
    def undecided(self) -> Mapping[str, int]:
        """Streams whose feed-forward is narrowed, until their channels have been chosen."""
        return {stream: down_of(self.parts[stream]).in_features for stream in self.whole}

    @torch.no_grad()
    def importance(self, output: str, tokens: Tensor) -> Tensor:
        """How much each hidden channel contributes, summed over tokens: (H,) float64.

        The square of its activation times the squared norm of the weights that read it: what the output loses, in the
        square, where a channel goes and no other makes up for it (compare Wanda, arXiv 2306.11695, eq. 1).

        Args:
            tokens: (N, C) that the feed-forward reads.
        """
        whole = self.whole[output].to(tokens.device)
        activation = hidden_of(whole, tokens.float()).double()  # (N, H)
        found = activation.square().sum(0) * down_of(whole).weight.double().square().sum(0)
        whole.cpu()  # at most one of them takes room on an accelerator
        return found

    @torch.no_grad()
    def choose(self, output: str, channels: Tensor) -> None:
        """Keep these hidden channels, with the teacher's weights.

        Args:
            channels: numbers of as many as stay, ascending.
        """
        whole, own = self.whole[output], self.parts[output]
        found = read_ffn(whole)
        down = whole.get_submodule(found.down)
        channels = channels.to(down.weight.device)
        rows = found.rows(channels, down.in_features)
        for name in found.ups:
            _copy(own.get_submodule(name), whole.get_submodule(name), rows)
        own.get_submodule(found.down).weight.copy_(down.weight[:, channels])
        if down.bias is not None:
            own.get_submodule(found.down).bias.copy_(down.bias)

    def regressions(self, inputs: Streams, targets: Streams) -> Iterator[Regression]:
        """Of a linear, itself; of a narrowed feed-forward, the linear that reads its hidden channels."""
        for stream, part in self.parts.items():
            if isinstance(part, nn.Linear):
                yield Regression(stream, inputs[stream], targets[stream], part)
            else:
                yield Regression(stream, hidden_of(part, inputs[stream]), targets[stream], down_of(part))


def _copy(own: nn.Linear, whole: nn.Linear, rows: Tensor) -> None:
    own.weight.copy_(whole.weight[rows])
    if whole.bias is not None:
        own.bias.copy_(whole.bias[rows])


def down_of(ffn: Any) -> Any:
    """The linear of a feed-forward that reads its hidden channels."""
    return ffn.get_submodule(read_ffn(ffn).down)


def hidden_of(ffn: Any, x: Tensor) -> Tensor:
    """The hidden channels of a feed-forward that reads `x`: (..., C) -> (..., H), gated where it has a gate."""
    read: list[Tensor] = []
    handle = down_of(ffn).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    try:
        ffn(x)
    finally:
        handle.remove()
    return read[0]


@torch.no_grad()
def _check_gate(ffn: Any) -> None:
    """Try, on two hidden channels, that each is of one row of the value's half and the same row of the gate's.

    Raises:
        ValueError: it is not; the message goes on from the part's name.
    """
    if isinstance(ffn, nn.Linear) or not (found := read_ffn(ffn)).fused:
        return
    tried = narrow_ffn(ffn, 2).to_empty(device="cpu").float()
    for parameter in tried.parameters():
        parameter.zero_()
    up = tried.get_submodule(found.ups[0])
    up.weight[[0, 2]] = 1.0
    first, second = hidden_of(tried, torch.ones(1, 1, up.in_features)).flatten().tolist()
    if not first or second:
        raise ValueError("is gated in another way than half by half, so it cannot be narrowed")


def hidden_channels(ffn: Any, keep: float) -> int:
    """How many hidden channels of a feed-forward stay; at least one, unless the share is zero.

    Raises:
        ValueError: as for `read_ffn`, unless the share is zero.
    """
    return max(1, round(keep * down_of(ffn).in_features)) if keep else 0


def read_and_returned(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> tuple[Tensor, Tensor]:
    """Of a call of a feed-forward, what it read and what it returned, each (B, S, C)."""
    return _as_tokens(args[0]), _as_tokens(output)


def _as_tokens(x: Tensor) -> Tensor:
    """(S, C), (B, S, C) or (B, T, H, W, C) -> (B, S, C)."""
    return x[None] if x.dim() == 2 else x.flatten(1, -2)


def _computed(own: Any, stream: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a part in whose place a unit is; what else the part reads is not needed."""
    return own.compute(stream, x)


class FFNKind(Kind):
    """A linear, or fewer hidden channels, for the feed-forwards of one block.

    Its streams are those whose feed-forward it replaces.
    """

    name = "ffn"
    narrows = True

    def footprint(self, unit: UnitPlan) -> frozenset[Part]:
        return frozenset((unit.span[0], f"{stream} ffn") for stream in unit.streams)

    def problem(self, unit: UnitPlan, teacher: Teacher) -> str:
        """Its block needs a feed-forward that stands by itself."""
        block = teacher.blocks[unit.span[0]]
        if unit.span[0] != unit.span[1]:
            one = [unit.span[0], unit.span[0]]
            return f"span {list(unit.span)} is not possible; kind ffn is for one block: {one}"
        if not block.ffn:
            return (
                f"the feed-forward of block {block.index} is no part of its own, but fused with its attention or laid "
                "out in the block; only depth units can replace it"
            )
        if not unit.streams or not set(unit.streams) <= set(block.ffn):
            return f"streams must be of {list(block.ffn)}: those that have a feed-forward in block {block.index}"
        for part, stock in zip(map(block.ffn.get, unit.streams), self._stock(unit, teacher).values(), strict=True):
            try:
                _check_gate(narrow_ffn(stock, hidden_channels(stock, unit.keep)))
            except ValueError as reason:
                return f"feed-forward '{part}' of block {block.index} {reason}"
        return ""

    def taps(self, unit: UnitPlan, anatomy: Anatomy) -> Wanted:
        return Wanted(frozenset(), frozenset(), frozenset(self._taps(unit, anatomy).values()))

    def _taps(self, unit: UnitPlan, anatomy: Anatomy) -> dict[str, Tap]:
        block = anatomy.blocks[unit.span[0]]
        return {stream: Tap(block.index, block.ffn[stream], read_and_returned) for stream in unit.streams}

    def batch(self, unit: UnitPlan, capture: Capture, text_mask: Tensor | None, anatomy: Anatomy) -> UnitBatch:
        parts = {stream: capture.parts[tap] for stream, tap in self._taps(unit, anatomy).items()}
        return UnitBatch(
            inputs={stream: read for stream, (read, _) in parts.items()},
            conditioning={},
            targets={stream: returned for stream, (_, returned) in parts.items()},
            text_mask=text_mask,
        )

    def build(self, unit: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
        block = teacher.blocks[unit.span[0]]
        parts: dict[str, Any] = {stream: teacher.filled(f"{block.key}.{block.ffn[stream]}") for stream in unit.streams}
        return FFNUnit(parts, unit.keep, dtype)

    def empty(self, unit: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
        return FFNUnit(self._stock(unit, teacher), unit.keep, dtype)

    def _stock(self, unit: UnitPlan, teacher: Teacher) -> dict[str, Any]:
        block = teacher.blocks[unit.span[0]]
        module = teacher.module(block)
        return {stream: module.get_submodule(block.ffn[stream]) for stream in unit.streams}

    def plug(self, unit: UnitPlan, own: Any, model: nn.Module, anatomy: Anatomy, stack: ExitStack) -> None:
        block = anatomy.blocks[unit.span[0]]
        for stream in unit.streams:
            part = anatomy.module(model, block).get_submodule(block.ffn[stream])
            replace_forward(part, partial(_computed, own, stream), stack)

    def saves(self, unit: UnitPlan, teacher: Teacher) -> int:
        stock = self._stock(unit, teacher)
        whole = sum(map(count_parameters, stock.values()))
        left = [narrow_ffn(part, hidden_channels(part, unit.keep)) for part in stock.values()]
        return whole - sum(map(count_parameters, left))

    def export(self, unit: UnitPlan, own: Sources, anatomy: Anatomy, model: Export) -> None:
        block = anatomy.blocks[unit.span[0]]
        for stream in unit.streams:
            part = f"{model.keys[block.index]}.{block.ffn[stream]}"
            like = model.take_out(part)
            new = {
                name.removeprefix(f"{stream}."): source for name, source in own.items() if name.startswith(f"{stream}.")
            }
            down = f"{read_ffn(model.stock.get_submodule(part)).down}.weight" if unit.keep else ""
            model.config["narrow_ffn"][part] = new[down].shape[1] if down else 0
            model.tensors |= {f"{part}.{name}": source.to(like.dtype) for name, source in new.items()}

    def shrink(self, unit: UnitPlan, module: Any, block: Block, streams: Streams) -> None:
        for stream in unit.streams:
            part = module.get_submodule(block.ffn[stream])
            module.set_submodule(block.ffn[stream], narrow_ffn(part, hidden_channels(part, unit.keep)))

    def parts(self, unit: UnitPlan, ffn: Mapping[str, str], text_only: frozenset[str]) -> frozenset[str]:
        """The feed-forwards of its streams; nothing where one of them is not there."""
        return frozenset(ffn[stream] for stream in unit.streams) if set(unit.streams) <= set(ffn) else frozenset()

    def label(self, unit: UnitPlan) -> str:
        kept = f" at {unit.keep:.0%}" if unit.keep else ""
        return f"{'+'.join(unit.streams)} ffn[{unit.span[0]}]{kept}"

    def facts(self, unit: UnitPlan) -> tuple[str, str]:
        by = f"{unit.keep:.0%} of the hidden channels" if unit.keep else "a linear"
        return f"{' and '.join(unit.streams)} feed-forward of block {unit.span[0]}", by
