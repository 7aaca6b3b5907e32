"""Memory of activations, measured on the meta device: nothing is allocated, every tensor that would be is counted.

Attention is measured as the fused kernels of accelerators do it, whose memory grows with the number of tokens, not with
its square. What kernels allocate inside for themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ppcl_ds.teacher.anatomy import Block, Streams
from ppcl_ds.units.loss import boundary_loss
from ppcl_ds.units.unit import Unit, UnitBatch


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of a device's tensors that are made inside and still alive.

    A tensor that was there before does not count, nor does a view; in `peak` stands the most that was alive at once.
    Where a block picks what a mask marks, all of it is marked: most memory that it can need.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.now = 0
        self.peak = 0
        self._known = WeakIdKeyDictionary()
        self._picks_all: Any = symbolic.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]

    def __enter__(self) -> Any:
        self._picks_all.__enter__()
        return super().__enter__()

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)
        self._picks_all.__exit__(*fault)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in self._storages((args, kwargs)):
            self._known[storage] = True
        output = func(*args, **(kwargs or {}))
        for storage in self._storages(output):
            if storage not in self._known:
                self._known[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    def _release(self, size: int) -> None:
        self.now -= size

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
        return [tensor.untyped_storage() for tensor in tensors if tensor.device.type == self.device]


class _FusedAttention(TorchFunctionMode):
    """Inside, attention over meta tensors is one kernel; PyTorch would build the whole matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            streams = [named[name] for name in ("query", "key", "value")]
            if streams[0].is_meta:
                return torch.ops.aten._scaled_dot_product_flash_attention(*streams)[0]
        return func(*args, **(kwargs or {}))


def unit_activations(unit: Unit, batch: UnitBatch, checkpointing: bool) -> int:
    """Most bytes alive at once in the forward, loss and backward of a unit on the meta device.

    Beside parameters, gradients and what the unit reads, which do not count.

    Every text token counts in the loss, as in the longest prompt. Gradients of parameters are taken to be there, as
    they are from the second micro-batch on.

    Args:
        unit: is changed.
        batch: what the unit reads and is judged by.
        checkpointing: recompute activations in the backward pass.
    """
    for part in unit.core.children():
        part.forward = partial(_with_fused_attention, part.forward)
    if checkpointing:
        unit.recompute()
    unit.requires_grad_(True)
    for parameter in unit.parameters():
        parameter.grad = torch.empty_like(parameter)
    with torch.enable_grad(), LiveBytes() as live:
        outputs = unit(batch.inputs, batch.conditioning)
        losses = [boundary_loss(outputs[s], target, None, 1.0) for s, target in batch.targets.items()]
        del outputs
        torch.stack(losses).sum().backward()
    return live.peak


@torch.no_grad()
def block_activations(block: Block, module: nn.Module, streams: Streams, conditioning: Mapping[str, Any]) -> int:
    """Most bytes alive at once in the forward of a frozen block, its outputs included."""
    with LiveBytes() as live, _FusedAttention():
        block.call(module, streams, dict(conditioning))
    return live.peak


def _with_fused_attention(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """A part's forward; a mode around the whole would not reach what the backward pass computes again."""
    with _FusedAttention():
        return forward(*args, **kwargs)
