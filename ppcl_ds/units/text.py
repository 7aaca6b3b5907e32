"""Text units: the text stream of a group of blocks as linears.

The attention of all but the group's first block reads a linear of that block's modulated text, and the stream jumps by
one linear from the end of the first block to the group's end.
Shapes: B batch, S tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_ds.teacher.anatomy import ATTENDED_TEXT, ATTENTION, Anatomy, Block, Capture, Streams, Tap, Wanted
from ppcl_ds.teacher.files import Sources
from ppcl_ds.teacher.modeling_pruned import ModulatedText, ResidualLinear, make_text_linear
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.spec import Export, Kind, Part, UnitPlan
from ppcl_ds.units.unit import Regression, Unit, UnitBatch, WidthUnit, count_parameters


class TextUnit(WidthUnit):
    """The text stream of a group of blocks as linears.

    Args:
        outputs: what it computes: the text as each block's attention reads it, from that of the group's first block
            (input `modulated`), and under `text` the stream after the group, from the stream after its first block.
        channels: C.
    """

    def __init__(self, outputs: Sequence[str], channels: int, dtype: torch.dtype) -> None:
        super().__init__({name: ResidualLinear(channels, dtype=dtype) for name in outputs})

    def forward(self, inputs: Streams, conditioning: dict[str, Any]) -> Streams:
        """Modulated text and text stream of the first block -> all outputs."""
        return {name: self.compute(name, inputs[_input_of(name)]) for name in self.parts}

    def regressions(self, inputs: Streams, targets: Streams) -> Iterator[Regression]:
        for name, linear in self.parts.items():
            x = inputs[_input_of(name)]
            yield Regression(name, x, targets[name].float() - x.float(), linear)


def _input_of(output: str) -> str:
    return output if output == "text" else "modulated"


def modulated(block: int) -> str:
    """Name of the text as the attention of a block reads it."""
    return f"modulated_{block}"


def attended_text(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[Tensor]:
    """Of a call of attention, the text that it read, normed and modulated, (B, S, C)."""
    return (kwargs[ATTENDED_TEXT],)


def _tap(block: int) -> Tap:
    return Tap(block, ATTENTION, attended_text)


class TextKind(Kind):
    """Linears for a group's text.

    Its streams are `text`, or nothing where the group ends with the last block, after which nobody reads it.
    """

    name = "text"
    one_block = False

    def outputs(self, unit: UnitPlan) -> tuple[str, ...]:
        """The text that each member's attention reads, and the stream after the group."""
        return (*(modulated(block) for block in unit.members), *unit.streams)

    def footprint(self, unit: UnitPlan) -> frozenset[Part]:
        """The first block's text has to be the teacher's own: the linears read it."""
        first, last = unit.span
        return frozenset(
            [(block, "text") for block in range(first, last + 1)] + [(block, "text ffn") for block in unit.members]
        )

    def changed(self, unit: UnitPlan) -> Sequence[int]:
        return unit.members

    def problem(self, unit: UnitPlan, teacher: Teacher) -> str:
        blocks = teacher.blocks[unit.span[0] : unit.span[1] + 1]
        if len(blocks) < 2 or blocks[0].list_name != blocks[-1].list_name:
            return f"span {list(unit.span)} is not possible; a text group holds at least two blocks of one list"
        if without := next((block for block in blocks if not block.text_only), None):
            return f"block {without.index} has no text stream of its own that could become linear"
        if unit.span[1] == len(teacher.blocks) - 1:
            return "streams must be []: nobody reads the text after the last block" if unit.streams else ""
        if unit.streams != ("text",):
            return f"streams must be [text]: block {unit.span[1] + 1} reads the text after the group"
        return ""

    def taps(self, unit: UnitPlan, anatomy: Anatomy) -> Wanted:
        """The text at each attention, and the stream after the first and the last block."""
        parts = frozenset(map(_tap, (unit.span[0], *unit.members)))
        return Wanted(frozenset(), frozenset(unit.span) if unit.streams else frozenset(), parts)

    def batch(self, unit: UnitPlan, capture: Capture, text_mask: Tensor | None, anatomy: Anatomy) -> UnitBatch:
        first, last = (anatomy.blocks[index] for index in unit.span)
        inputs = {"modulated": capture.parts[_tap(first.index)][0]}
        targets = {modulated(block): capture.parts[_tap(block)][0] for block in unit.members}
        for stream in unit.streams:
            inputs[stream] = capture.streams[first.leaving][stream]
            targets[stream] = capture.streams[last.leaving][stream]
        return UnitBatch(inputs=inputs, conditioning={}, targets=targets, text_mask=text_mask)

    def build(self, unit: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
        return TextUnit(unit.outputs, teacher.blocks[unit.span[0]].text_channels, dtype)

    def empty(self, unit: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
        return self.build(unit, teacher, dtype).to("meta")

    def plug(self, unit: UnitPlan, own: Any, model: nn.Module, anatomy: Anatomy, stack: ExitStack) -> None:
        """Attention of the members is handed linears; their text stream passes, and jumps after the last."""
        first, *members = (anatomy.blocks[index] for index in (unit.span[0], *unit.members))
        kept: dict[str, Tensor] = {}

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            kept["modulated"] = kwargs[ATTENDED_TEXT]

        def hand_over(block: Block, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {ATTENDED_TEXT: own.compute(modulated(block.index), kept["modulated"])}

        def text_passes(block: Block, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            streams, (entering, _) = block.read_output(output), block.split_call(module, args, kwargs)
            if "text" in streams:
                moves = block is members[-1] and "text" in unit.streams
                streams["text"] = own.compute("text", entering["text"]) if moves else entering["text"]
            return block.write_output(streams)

        attention = anatomy.module(model, first).get_submodule(ATTENTION)
        stack.callback(attention.register_forward_pre_hook(keep, with_kwargs=True).remove)
        for block in members:
            module = anatomy.module(model, block)
            attention = module.get_submodule(ATTENTION)
            stack.callback(attention.register_forward_pre_hook(partial(hand_over, block), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(text_passes, block), with_kwargs=True).remove)

    def saves(self, unit: UnitPlan, teacher: Teacher) -> int:
        gone = [
            teacher.module(teacher.blocks[block]).get_submodule(part)
            for block in unit.members
            for part in teacher.blocks[block].text_only
        ]
        linear = ResidualLinear(teacher.blocks[unit.span[0]].text_channels, device="meta")
        return sum(map(count_parameters, gone)) - len(unit.outputs) * count_parameters(linear)

    def export(self, unit: UnitPlan, own: Sources, anatomy: Anatomy, model: Export) -> None:
        for member in unit.members:
            key = model.keys[member]
            model.config["linear_text"].append(key)
            model.config["text_place"] = anatomy.blocks[member].returns["text"]
            for part in anatomy.blocks[member].text_only:
                like = model.take_out(f"{key}.{part}")
            linears = {"text_in": modulated(member)}
            if member == unit.span[1] and "text" in unit.streams:
                linears["text_out"] = "text"
                model.config["text_jumps"].append(key)
            for name, output in linears.items():
                for what in ("weight", "bias"):
                    model.tensors[f"{key}.{name}.{what}"] = own[f"{output}.{what}"].to(like.dtype)

    def shrink(self, unit: UnitPlan, module: Any, block: Block, streams: Streams) -> None:
        """The text that enters the block stands for the modulated text of another one."""
        source = ModulatedText()
        source.text = streams["text"]
        jump = "text" in unit.streams and block.index == unit.span[1]
        make_text_linear(module, source, jump, block.returns["text"])

    def parts(self, unit: UnitPlan, ffn: Mapping[str, str], text_only: frozenset[str]) -> frozenset[str]:
        return text_only

    def label(self, unit: UnitPlan) -> str:
        return f"text[{unit.span[0]},{unit.span[1]}]"

    def facts(self, unit: UnitPlan) -> tuple[str, str]:
        first, last = unit.span
        blocks = f"block {last}" if last == first + 1 else f"blocks {first + 1} to {last}"
        return f"the text stream of {blocks}", f"linears of block {first}'s"
