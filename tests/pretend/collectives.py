"""Collectives that reach nobody: each is written down, and asserts what NCCL would.

A rank is pretended alone. What it would be told by others is what it says itself, as ranks are alike; the layouts of
the exchange are those that this rank's parcels have.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import Tensor


@dataclass
class Program:
    """What a rank asks of the others, in order.

    Attributes:
        calls: `(operation, ranks of the group, what all of them have to agree on)`.
        groups: `(backend, ranks, whether only they make it)` of every group that was made.
        told: what a broadcast object is, where this rank has none itself.
        gathered: `ahead` and `late` -> bytes of the teacher that were gathered before, and in, a block's hook; `else`:
            of anything else.
        waited: operation -> times that the device was told to wait for one that was under way.
    """

    calls: list[tuple[str, tuple[int, ...], Any]] = field(default_factory=list)
    groups: list[tuple[str, tuple[int, ...], bool]] = field(default_factory=list)
    told: Any = None
    gathered: Counter[str] = field(default_factory=Counter)
    waited: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Forget what was called; groups stay."""
        self.calls.clear()
        self.gathered.clear()
        self.waited.clear()


class _Done:
    """A collective under way."""

    def __init__(self, what: str, waited: Counter[str]) -> None:
        self.what, self.waited = what, waited

    def wait(self, *_: Any, **__: Any) -> bool:
        self.waited[self.what] += 1
        return True

    def is_completed(self) -> bool:
        return True


def join(rank: int, world: int, ranks_per_node: int) -> Program:
    """Be rank `rank` of `world`, in this process, for good."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank % ranks_per_node),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    program = Program()
    _Collectives(program).install()
    _Groups(program, rank, world).install()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=60))
    # What DeepSpeed compares over the ranks in its first forwards is the same everywhere.
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    coordinator.assert_ints_same_as_other_ranks = lambda ints, group=None: None
    return program


class _Collectives:
    """In the place of torch's, by their names."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def install(self) -> None:
        for name in (name for name in vars(type(self)) if not name.startswith("_") and name != "install"):
            setattr(dist, name, getattr(self, name))

    def _note(self, what: str, group: Any, agreed: Any, asynchronous: bool = False) -> Any:
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        self.program.calls.append((what, ranks, agreed))
        return _Done(what, self.program.waited) if asynchronous else None

    def all_reduce(self, tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
        assert tensor.is_contiguous()
        if not tensor.is_meta and op in (None, dist.ReduceOp.SUM):
            tensor.mul_(dist.get_world_size(group))
        return self._note("all_reduce", group, tensor.nbytes, async_op)

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        assert output_tensor.device == input_tensor.device
        assert output_tensor.numel() == input_tensor.numel() * dist.get_world_size(group)
        self.program.gathered[when_gathered()] += output_tensor.nbytes
        return self._note("all_gather", group, output_tensor.nbytes, async_op)

    def broadcast(
        self, tensor: Tensor, src: Any = None, group: Any = None, async_op: bool = False, group_src: Any = None
    ) -> Any:
        assert tensor.is_contiguous()
        return self._note("broadcast", group, tensor.nbytes, async_op)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        assert output.is_contiguous()
        assert input.is_contiguous()
        assert (output.dtype, output.device.type) == (input.dtype, input.device.type) == (input.dtype, "meta")
        assert (sum(output_split_sizes), sum(input_split_sizes)) == (output.numel(), input.numel())
        return self._note("all_to_all", group, (list(input_split_sizes), list(output_split_sizes)), async_op)

    def gather(self, tensor: Tensor, gather_list: list[Tensor] | None, dst: int = 0, group: Any = None) -> None:
        for each in gather_list or ():
            each.copy_(tensor)
        self._note("gather", group, tensor.nbytes)

    def send(self, tensor: Tensor, dst: int, group: Any = None, tag: int = 0, group_dst: Any = None) -> None:
        assert tensor.is_contiguous()
        self._note("send", group, (dst, tensor.nbytes))

    def recv(self, tensor: Tensor, src: int, group: Any = None, tag: int = 0, group_src: Any = None) -> int:
        self._note("recv", group, (src, tensor.nbytes))
        return src

    def barrier(self, group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return self._note("barrier", group, 0, async_op)

    def all_gather_object(self, object_list: list[Any], obj: Any, group: Any = None) -> None:
        self._note("all_gather_object", group, 0)
        object_list[:] = [obj] * len(object_list)

    def broadcast_object_list(self, object_list: list[Any], src: Any = None, group: Any = None, **_: Any) -> None:
        self._note("broadcast_object", group, 0)
        object_list[:] = [self.program.told if each is None else each for each in object_list]


class _Groups:
    """Every group that is made is a fake one, and written down."""

    def __init__(self, program: Program, rank: int, world: int) -> None:
        self.program, self.rank, self.world, self.stock = program, rank, world, dist.new_group

    def install(self) -> None:
        dist.new_group = self.new_group  # type: ignore[assignment]
        dist.new_subgroups_by_enumeration = self.by_enumeration  # type: ignore[assignment]

    def new_group(self, ranks: Any = None, timeout: Any = None, backend: str | None = None, **options: Any) -> Any:
        members = tuple(ranks) if ranks is not None else tuple(range(self.world))
        local = bool(options.get("use_local_synchronization"))
        self.program.groups.append((backend or "nccl", members, local))
        return self.stock(list(members), backend="fake")

    def by_enumeration(
        self, ranks_per_subgroup_list: Any, timeout: Any = None, backend: str | None = None, **_: Any
    ) -> Any:
        made = {tuple(ranks): self.new_group(ranks, backend=backend) for ranks in ranks_per_subgroup_list}
        [own] = [group for ranks, group in made.items() if self.rank in ranks]
        return own, ranks_per_subgroup_list


def when_gathered() -> str:
    """Whether a gather was asked for ahead of the block that needs it; DeepSpeed has a function for each."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_fetch_sub_module_impl":
            return "late" if frame.f_lineno < _prefetching_begins() else "ahead"
        frame = frame.f_back
    return "else"


@cache
def _prefetching_begins() -> int:
    """The line of DeepSpeed's fetch where what later modules need begins."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    lines, first = inspect.getsourcelines(Coordinator._fetch_sub_module_impl)
    return first + next(number for number, line in enumerate(lines) if "kick off parameter prefetches" in line)
