"""The frozen teacher as a DeepSpeed ZeRO-3 engine that is never whole on any rank, not even while it loads."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import Tensor, nn

from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles


class _Partitioner(Init):
    """DeepSpeed's ZeRO-3 partitioning for a model whose parameters are still on the meta device."""

    def reserve(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        """A parameter of the same shape of which this rank holds its own part, not yet filled.

        The stock class would broadcast every parameter from rank 0 here.
        """
        # Memory that nobody has written to costs nothing until the rank's own part is copied out of it.
        memory = torch.empty(parameter.shape, dtype=dtype, device=self.local_device)
        whole: Any = nn.Parameter(memory, requires_grad=False)
        self._convert_to_deepspeed_param(whole)
        whole.partition()
        return whole


def load_teacher(files: ModelFiles, config: dict[str, Any], dtype: torch.dtype) -> deepspeed.DeepSpeedEngine:
    """The teacher as a frozen ZeRO-3 engine over all ranks.

    Every rank must call this, before any pipeline engine is built (DeepSpeed's global `mpu` is read here). Afterwards
    each rank holds its own partition, read by itself from the safetensors files.

    Args:
        files: the teacher on disk.
        config: DeepSpeed configuration with ZeRO stage 3.
        dtype: number format; what the family keeps in float32 stays float32.
    """
    groups.mpu = None
    model = files.empty_model()
    anatomy = Anatomy(model)
    partitioner = _Partitioner(config_dict_or_path=config, mem_efficient_linear=False)
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            key = f"{prefix}.{name}" if prefix else name
            own = partitioner.reserve(parameter, files.runs_as(key, dtype))
            module.register_parameter(name, own)
            _fill_partition(files, key, own)
    for name, buffer in model.named_buffers():
        if name in files.keys:  # stored ones come in the number format of parameters, computed ones stay as they are
            buffer.data = files.tensor(name).to(files.runs_as(name, dtype))
    model.to(get_accelerator().current_device_name())
    # A block is gathered as one piece: fewer, larger gathers, and hooks only where blocks begin and end.
    set_z3_leaf_modules(
        model, sorted({type(anatomy.module(model, b)) for b in anatomy.blocks}, key=lambda cls: cls.__name__)
    )
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def _fill_partition(files: ModelFiles, name: str, parameter: Any) -> None:
    own: Tensor = parameter.ds_tensor  # (ceil(numel / ranks),), the last rank's padded
    start = own.numel() * parameter.ds_zero_partition_rank
    stop = min(start + own.numel(), parameter.ds_numel)
    if start < stop:
        values = files.flat_range(name, start, stop)
        own[: stop - start].copy_(values)
