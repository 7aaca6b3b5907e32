"""The teacher with a variant's units plugged in, while it is sharded and they are spread over the stages.

Used to look at variants during training: nothing is assembled, so it works at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppcl_ds.teacher.anatomy import ATTENDED_TEXT, ATTENTION, Anatomy, Block
from ppcl_ds.units.plan import Plan, UnitPlan, modulated
from ppcl_ds.units.unit import Unit


@dataclass(frozen=True)
class _Plug:
    """A unit as the ranks of a pipe group see it: one of them has it, and sends the others what it computes."""

    unit: Any
    group: dist.ProcessGroup
    owner: int

    def share(self, output: Tensor) -> Tensor:
        """The owner's tensor on every rank; the others give one of its shape."""
        output = output.contiguous()
        dist.broadcast(output, dist.get_global_rank(self.group, self.owner), group=self.group)
        return output

    def compute(self, name: str, x: Tensor) -> Tensor:
        """An output of a width unit that is as large as what it is computed from."""
        return self.share(torch.empty_like(x) if self.unit is None else self.unit.compute(name, x))


@contextmanager
def plugged(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    variant: str,
    units: Mapping[str, Unit],
    group: dist.ProcessGroup,
    owner: Mapping[str, int],
) -> Iterator[None]:
    """Inside, `model` computes what the variant would.

    Every rank of the pipe group must enter, and run `model` on the same inputs.

    Args:
        units: the units of this rank's stage.
        owner: unit name -> its stage, which computes it and sends the result to the others of `group`.
    """
    plug_in = {"depth": _plug_depth, "text": _plug_text, "ffn": _plug_ffn}
    with ExitStack() as stack, torch.no_grad():
        for unit in plan.units_of(variant):
            plug = _Plug(units.get(unit.name), group, owner[unit.name])
            plug_in[unit.kind](unit, plug, model, anatomy, stack)
        yield


def _replace(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    module.forward = forward
    stack.callback(delattr, module, "forward")


def _plug_depth(plan: UnitPlan, plug: _Plug, model: nn.Module, anatomy: Anatomy, stack: ExitStack) -> None:
    blocks = [anatomy.blocks[index] for index in (plan.span[0], *plan.members)]
    modules = [anatomy.module(model, block) for block in blocks]
    _replace(modules[0], partial(_run_depth, blocks[0], modules[0], plug), stack)
    for block, module in zip(blocks[1:], modules[1:], strict=True):
        _replace(module, partial(_pass_through, block, module), stack)


def _run_depth(block: Block, module: nn.Module, plug: _Plug, *args: Any, **kwargs: Any) -> Any:
    streams, conditioning = block.split_call(module, args, kwargs)
    outputs = dict(plug.unit(streams, conditioning)) if plug.unit is not None else {}
    return block.write_output({s: plug.share(outputs.get(s, torch.empty_like(streams[s]))) for s in block.returns})


def _pass_through(block: Block, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block.write_output(block.split_call(module, args, kwargs)[0])


def _plug_ffn(plan: UnitPlan, plug: _Plug, model: nn.Module, anatomy: Anatomy, stack: ExitStack) -> None:
    block = anatomy.blocks[plan.span[0]]
    for stream in plan.streams:
        part = anatomy.module(model, block).get_submodule(block.ffn[stream])
        _replace(part, partial(plug.compute, stream), stack)


def _plug_text(plan: UnitPlan, plug: _Plug, model: nn.Module, anatomy: Anatomy, stack: ExitStack) -> None:
    first, *members = (anatomy.blocks[index] for index in (plan.span[0], *plan.members))
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        kept["modulated"] = kwargs[ATTENDED_TEXT]

    def hand_over(block: Block, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {ATTENDED_TEXT: plug.compute(modulated(block.index), kept["modulated"])}

    def text_passes(block: Block, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        streams, (entering, _) = block.read_output(output), block.split_call(module, args, kwargs)
        if "text" in streams:
            moves = block is members[-1] and "text" in plan.streams
            streams["text"] = plug.compute("text", entering["text"]) if moves else entering["text"]
        return block.write_output(streams)

    attention = anatomy.module(model, first).get_submodule(ATTENTION)
    stack.callback(attention.register_forward_pre_hook(keep, with_kwargs=True).remove)
    for block in members:
        module = anatomy.module(model, block)
        attention = module.get_submodule(ATTENTION)
        stack.callback(attention.register_forward_pre_hook(partial(hand_over, block), with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(partial(text_passes, block), with_kwargs=True).remove)
