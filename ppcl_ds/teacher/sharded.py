"""The frozen teacher over all ranks: a DeepSpeed ZeRO-3 engine that is never whole on any of them, or whole on each."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import Tensor, nn

from ppcl_ds import launch
from ppcl_ds.teacher.files import ModelFiles
from ppcl_ds.teacher.gathering import with_gathering
from ppcl_ds.teacher.teacher import Teacher


class _Partitioner(Init):
    """DeepSpeed's ZeRO-3 partitioning for a model whose parameters are still on the meta device."""

    def reserve(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        """A parameter of the same shape of which this rank holds its own part, not yet filled.

        The stock class would broadcast every parameter from rank 0 here.
        """
        # One parameter for a moment; on the CPU not even that, as memory that nobody has written to costs nothing.
        memory = torch.empty(parameter.shape, dtype=dtype, device=self.local_device)
        whole: Any = nn.Parameter(memory, requires_grad=False)
        self._convert_to_deepspeed_param(whole)
        whole.partition()
        return whole


class Whole(nn.Module):
    """A teacher that this rank has to itself, called as the engine of one that is divided.

    Attributes:
        module: the transformer.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module, self.device = module, device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


Loaded: TypeAlias = deepspeed.DeepSpeedEngine | Whole
"""Either is called as the transformer is, which is its `module`."""


def load_teacher(teacher: Teacher, config: dict[str, Any], dtype: torch.dtype, ranks_per_copy: int | None) -> Loaded:
    """The frozen teacher: as a ZeRO-3 engine over all ranks, or as it is.

    Every rank must call this, before any pipeline engine is built (DeepSpeed's global `mpu` is read here). Afterwards
    each rank holds its own partition, or everything, read by itself from the safetensors files.

    Args:
        config: DeepSpeed configuration with ZeRO stage 3; how much is gathered at a time is filled in, see
            `with_gathering`. Its `offload_param` has partitions lie in CPU memory.
        dtype: of the weights; what the family keeps in float32 stays float32.
        ranks_per_copy: so many neighbouring ranks hold a whole copy between them, and gather from each other alone
            (ZeRO++ hpZ, arXiv 2306.10209). None: the ranks of a node, so that forwards stay off the network between
            nodes. With all ranks, or one alone in its node, there is just the one partition over all. 1: every rank
            holds all of it, and none ever waits for another in a forward.
    """
    if ranks_per_copy == 1:
        return _load_whole(teacher, dtype)
    config = with_gathering(config, teacher)
    ranks_per_copy = ranks_per_copy or int(os.environ["LOCAL_WORLD_SIZE"])
    if 1 < ranks_per_copy < dist.get_world_size():
        zero = config["zero_optimization"] | {"zero_hpz_partition_size": ranks_per_copy}
        config = config | {"zero_optimization": zero}
    groups.mpu = None
    partitioner = _Partitioner(
        config_dict_or_path=config,
        mem_efficient_linear=False,
        zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),  # of an earlier teacher, if any
    )

    def fill(files: ModelFiles, key: str, parameter: Any) -> None:
        _fill_partition(files, key, parameter)
        if partitioner.pin_memory:
            _copied_without_waiting(parameter)

    model = _filled(teacher, dtype, partitioner.reserve, fill)
    # A block is gathered as one piece: fewer, larger gathers, and hooks only where blocks begin and end.
    set_z3_leaf_modules(
        model, sorted({type(teacher.module(block)) for block in teacher.blocks}, key=lambda cls: cls.__name__)
    )
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    launch.set_timeout()  # else its groups wait for ten minutes, and a rank may have longer to do by itself
    return engine


def _load_whole(teacher: Teacher, dtype: torch.dtype) -> Whole:
    device = torch.device(get_accelerator().current_device_name())

    def reserve(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False)

    def fill(files: ModelFiles, key: str, parameter: Any) -> None:
        _read_into(parameter.data.flatten(), files, key, 0, parameter.numel())

    return Whole(_filled(teacher, dtype, reserve, fill), device).eval()


def _filled(
    teacher: Teacher,
    dtype: torch.dtype,
    reserve: Callable[[nn.Parameter, torch.dtype], nn.Parameter],
    fill: Callable[[ModelFiles, str, nn.Parameter], None],
) -> nn.Module:
    """The transformer on this rank's device, of which it has what `reserve` makes and `fill` reads, one by one."""
    files, model = teacher.files, teacher.files.empty_model()
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            key = f"{prefix}.{name}" if prefix else name
            own = reserve(parameter, files.runs_as(key, dtype))
            module.register_parameter(name, own)
            fill(files, key, own)
    for name, buffer in model.named_buffers():
        if name in files.keys:  # stored ones come in the dtype of parameters, computed ones stay as they are
            buffer.data = files.tensor(name).to(files.runs_as(name, dtype))
    return model.to(get_accelerator().current_device_name())


def _copied_without_waiting(parameter: Any) -> None:
    """Have what is pinned in CPU memory go to the accelerator without the host waiting for it.

    DeepSpeed calls `to` of each part that it gathers over several ranks, and waits, parameter by parameter.
    """
    parts = (parameter.ds_tensor, parameter.ds_secondary_tensor)
    for part in (part for part in parts if part is not None):
        part.to = partial(part.to, non_blocking=True)


def forget_order(engine: Loaded) -> None:
    """Have the next forwards record anew in which order parameters are fetched, if any are.

    DeepSpeed fetches ahead along the order it has recorded. After a forward that went further than the next ones will,
    it would fetch, in each of them, what nobody uses, and leave that gathered after the forward.
    """
    if isinstance(engine, Whole):
        return
    coordinator = engine.optimizer.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def _fill_partition(files: ModelFiles, name: str, parameter: Any) -> None:
    _read_into(parameter.ds_tensor, files, name, parameter.ds_zero_partition_rank, parameter.ds_numel)
    if parameter.ds_secondary_tensor is not None:
        group = groups._get_zero_param_intra_parallel_rank_in_mygroup()
        _read_into(parameter.ds_secondary_tensor, files, name, group, parameter.ds_numel)


def _read_into(own: Tensor, files: ModelFiles, name: str, rank: int, whole: int) -> None:
    """Fill part number `rank` of a parameter of `whole` elements; the last rank's part may be padded."""
    start = own.numel() * rank
    stop = min(start + own.numel(), whole)
    if start < stop:
        values = files.flat_range(name, start, stop)
        own[: stop - start].copy_(values)
