"""The teacher with a variant's units plugged in, while it is sharded and they are spread over the stages.

Used to look at variants during training: no model is assembled, so it works at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.units.unit import Unit

if TYPE_CHECKING:
    from ppcl_ds.teacher.teacher import Teacher
    from ppcl_ds.units.plan import Plan, UnitPlan


def replace_forward(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    """Have a module run another forward until `stack` closes."""
    module.forward = forward
    stack.callback(delattr, module, "forward")


@contextmanager
def plugged(model: nn.Module, anatomy: Anatomy, plan: Plan, variant: str, units: Mapping[str, Unit]) -> Iterator[None]:
    """Inside, `model` computes what the variant would.

    Args:
        units: the variant's, at least, on the device; see `borrow`.
    """
    with ExitStack() as stack, torch.no_grad():
        for unit in plan.units_of(variant):
            unit.behaviour.plug(unit, units[unit.name], model, anatomy, stack)
        yield


def borrow(
    wanted: Iterable[UnitPlan],
    own: Mapping[str, Unit],
    owner: Mapping[str, int],
    group: dist.ProcessGroup,
    teacher: Teacher,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Unit]:
    """Units on every rank of a pipe group, each as the rank that trains it has it now. Collective over them.

    Args:
        own: units of this rank's stage, which are returned as they are; the others are copies.
        owner: unit name -> its stage, the rank of `group` that has it.
    """
    found = {}
    for unit in wanted:
        mine = own[unit.name] if unit.name in own else _place_for(unit, teacher, dtype, device)
        found[unit.name] = mine
        tensors = (*mine.core.parameters(), *mine.core.buffers()) if dist.get_world_size(group) > 1 else ()
        for tensor in tensors:
            dist.broadcast(tensor.detach(), dist.get_global_rank(group, owner[unit.name]), group=group)
    return found


def _place_for(unit: UnitPlan, teacher: Teacher, dtype: torch.dtype, device: torch.device) -> Unit:
    """A unit on the device whose parameters are yet to come."""
    found = unit.behaviour.empty(unit, teacher, dtype)
    for module in found.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module.register_parameter(name, nn.Parameter(memory, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    found.free_calibration()
    return found.to(device)
