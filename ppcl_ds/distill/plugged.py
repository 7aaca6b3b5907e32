"""The teacher with a variant's units plugged in, while it is sharded and they are spread over the stages.

Used to look at variants during training: nothing is assembled, so it works at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ppcl_ds.families.anatomy import Anatomy, Block
from ppcl_ds.planning.plan import Plan
from ppcl_ds.units.depth import DepthUnit


@contextmanager
def plugged(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    variant: str,
    units: Mapping[str, DepthUnit],
    group: dist.ProcessGroup,
    owner: Mapping[str, int],
) -> Iterator[None]:
    """Inside, `model` computes what the variant would.

    Every rank of the pipe group must enter, and run `model` on the same inputs.

    Args:
        units: the units of this rank's stage.
        owner: unit name -> its stage, which computes it and sends the result to the others of `group`.
    """
    replaced: list[nn.Module] = []
    try:
        for unit in plan.units_of(variant):
            blocks = [anatomy.blocks[index] for index in range(unit.span[0], unit.span[1] + 1)]
            modules = [anatomy.module(model, block) for block in blocks]
            replaced += modules
            modules[0].forward = _run_unit(blocks[0], modules[0], units.get(unit.name), group, owner[unit.name])
            for block, module in zip(blocks[1:], modules[1:], strict=True):
                module.forward = _pass_through(block, module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _run_unit(
    block: Block, module: nn.Module, unit: DepthUnit | None, group: dist.ProcessGroup, owner: int
) -> Callable[..., Any]:
    @torch.no_grad()
    def forward(*args: Any, **kwargs: Any) -> Any:
        streams, conditioning = block.split_call(module, args, kwargs)
        outputs = dict(unit(streams, conditioning)) if unit is not None else {}
        for stream in block.returns:
            tensor = outputs.get(stream, torch.empty_like(streams[stream])).contiguous()
            dist.broadcast(tensor, dist.get_global_rank(group, owner), group=group)
            outputs[stream] = tensor
        return block.write_output(outputs)

    return forward


def _pass_through(block: Block, module: nn.Module) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return block.write_output(block.split_call(module, args, kwargs)[0])

    return forward
