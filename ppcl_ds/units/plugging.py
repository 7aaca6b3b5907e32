"""The teacher with a variant's units plugged in, while it is sharded and they are spread over the stages.

Used to look at variants during training: nothing is assembled, so it works at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.units.unit import Unit

if TYPE_CHECKING:
    from ppcl_ds.units.plan import Plan


@dataclass(frozen=True)
class Plug:
    """A unit as the ranks of a pipe group see it: one of them has it, and sends the others what it computes.

    Attributes:
        unit: on the rank that has it; None on the others.
        owner: which rank of `group` that is.
    """

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


def replace_forward(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    """Have a module run another forward until `stack` closes."""
    module.forward = forward
    stack.callback(delattr, module, "forward")


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
    with ExitStack() as stack, torch.no_grad():
        for unit in plan.units_of(variant):
            plug = Plug(units.get(unit.name), group, owner[unit.name])
            unit.behaviour.plug(unit, plug, model, anatomy, stack)
        yield
