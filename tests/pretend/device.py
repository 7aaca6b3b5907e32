"""A pretended accelerator: its tensors lie on the meta device and nothing is computed, but everything else is real.

What an accelerator would show is seen anyway: which device each tensor is on, every place where the host waits for the
device, bytes in memory, kernels. `pretend` puts it in the place of the machine's own, in a process of its own: nothing
is put back.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ppcl_ds.estimate.activations import LiveBytes
from tests.pretend.collectives import when_gathered

ROOT = Path(__file__).parents[2]

MAY_MIX = frozenset(("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "set_"))
"""Operations that may have tensors on two devices: copies, and indices, which CUDA takes from the CPU too."""

NEED_DATA = frozenset(("nonzero", "masked_select", "_unique2", "equal"))
"""Operations whose answer nobody has; on CUDA the host would wait for it."""


class MixedDevicesError(RuntimeError):
    """An operation whose tensors lie on two devices."""


@dataclass
class Seen:
    """What happened since it was last emptied.

    Attributes:
        waits: place in our code -> times that the host waited for the device there.
        copies: place -> bytes that were copied to the device without the host waiting.
        fetched: `ahead` and `late` -> those of them that are the teacher's, from CPU memory, see `when_gathered`.
        kernels: operation -> calls on the device.
        attention: `flash` or `masked` -> calls of attention's kernels.
    """

    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    fetched: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()


def place() -> str:
    """Where in the package this happens, `folder/file.py:function`; in DeepSpeed or elsewhere if nowhere in it."""
    frame: Any = sys._getframe(1)
    outside = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(f"{ROOT}/ppcl_ds/"):
            return f"{path.removeprefix(f'{ROOT}/ppcl_ds/')}:{frame.f_code.co_name}"
        if "/deepspeed/" in path and not outside:
            outside = f"deepspeed/{path.split('/deepspeed/')[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return outside or "elsewhere"


class Queue:
    """A queue of work; what is in it is done at once."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def wait_stream(self, other: Queue) -> None: ...

    def wait_event(self, event: Moment) -> None: ...

    def record_event(self, event: Moment | None = None) -> Moment:
        return event or Moment(self.seen)

    def synchronize(self) -> None:
        self.seen.waits[place()] += 1

    def query(self) -> bool:
        return True


class Moment:
    """A moment of a stream."""

    def __init__(self, seen: Seen, **options: Any) -> None:
        self.seen = seen

    def record(self, stream: Queue | None = None) -> None: ...

    def wait(self, stream: Queue | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.seen.waits[place()] += 1

    def elapsed_time(self, end: Moment) -> float:
        return 1.0


class Pretended(CPU_Accelerator):
    """What DeepSpeed asks an accelerator; it answers as CUDA would, so that DeepSpeed takes its CUDA branches.

    Args:
        memory: bytes.
        live: what fills them.
    """

    def __init__(self, seen: Seen, memory: int, live: LiveBytes) -> None:
        super().__init__()
        self._name, self._communication_backend_name = "pretended", "fake"
        self.seen, self.streams = seen, [Queue(seen)]
        self.memory, self.live = memory, live

    def is_synchronized_device(self) -> bool:
        return False

    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def device_name(self, device_index: int | None = None) -> str:
        return "meta"

    def current_device_name(self) -> str:
        return "meta"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device("meta")

    def current_device(self) -> int:
        return 0

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None:
        self.seen.waits[place()] += 1

    def Stream(self, *_: Any, **__: Any) -> Queue:  # noqa: N802 - DeepSpeed's name
        return Queue(self.seen)

    def Event(self, *_: Any, **__: Any) -> Moment:  # noqa: N802
        return Moment(self.seen)

    @contextmanager
    def stream(self, stream: Queue) -> Iterator[None]:
        self.streams.append(stream or self.streams[0])
        yield
        self.streams.pop()

    def current_stream(self, device_index: int | None = None) -> Queue:
        return self.streams[-1]

    def default_stream(self, device_index: int | None = None) -> Queue:
        return self.streams[0]

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.is_meta

    def pin_memory(self, tensor: Tensor, align_bytes: int = 1) -> Tensor:
        return tensor

    def available_memory(self, device_index: int | None = None) -> int:
        return self.memory - self.live.now

    def memory_allocated(self, device_index: int | None = None) -> int:
        return self.live.now

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return self.live.peak

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        self.live.peak = self.live.now

    memory_reserved = memory_cached = memory_allocated
    max_memory_reserved = max_memory_cached = max_memory_allocated


class Device(LiveBytes):
    """The device itself: inside, what its tensors do is refused, answered or counted.

    `now` and `peak` are its bytes, see `LiveBytes`.
    """

    def __init__(self, seen: Seen) -> None:
        super().__init__("meta")
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A number from the CPU may join tensors of the device, but for cat and stack.
        devices = {t.device.type for t in tensors if t.dim() or t.is_meta or name in ("cat", "stack")}
        if len(devices) > 1 and name not in MAY_MIX:
            shapes = [(tensor.device.type, tuple(tensor.shape)) for tensor in tensors]
            raise MixedDevicesError(f"{func} of {shapes} at {place()}")
        if name == "_to_copy":
            return self._copied(func, args, kwargs)
        if name == "copy_" and len(devices) > 1:
            return self._copied_into(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        if not any(tensor.is_meta for tensor in tensors):
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.seen.kernels[name] += 1
        if name == "_local_scalar_dense":
            self.seen.waits[place()] += 1
            return True if tensors[0].dtype == torch.bool else 1
        if name in NEED_DATA:
            raise RuntimeError(f"{func} at {place()} asks for numbers that a pretended device does not have")
        if name == "index" and (whole := self._picked(args)) is not None:
            return super().__torch_dispatch__(torch.ops.aten.clone.default, types, (whole,))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _picked(self, args: Any) -> Tensor | None:
        """`tokens[mask]`: how many count is only known to the device; here all do."""
        if len(args[1]) != 1 or args[1][0] is None or args[1][0].dtype != torch.bool:
            return None
        self.seen.waits[place()] += 1
        return args[0].flatten(0, args[1][0].dim() - 1)

    def _copied(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        target = torch.device(kwargs.get("device") or tensor.device).type
        if tensor.is_meta and target == "cpu":
            self.seen.waits[place()] += 1
            return torch.ones(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
        if target == "meta" and not tensor.is_meta:
            self._arrives(tensor, bool(kwargs.get("non_blocking")))
        elif tensor.is_meta:
            self.seen.kernels["_to_copy"] += 1
        return super().__torch_dispatch__(func, (), args, kwargs)

    def _copied_into(self, into: Tensor, tensor: Tensor, non_blocking: bool) -> Tensor:
        if into.is_meta:
            self._arrives(tensor, non_blocking)
        elif not non_blocking:
            self.seen.waits[place()] += 1
        return into

    def _arrives(self, tensor: Tensor, non_blocking: bool) -> None:
        if non_blocking:
            self.seen.copies[place()] += tensor.nbytes
            if (when := when_gathered()) != "else":
                self.seen.fetched[when] += tensor.nbytes
        elif tensor.dim():
            self.seen.waits[place()] += 1

    def leave_out(self, module: nn.Module) -> None:
        """Do not count a module that is on the meta device for its shapes alone."""
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_meta:
                self.now -= tensor.untyped_storage().nbytes()


def _attention(seen: Seen) -> Any:
    """`F.scaled_dot_product_attention`, which takes on the device the kernel that CUDA would."""
    stock = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **options: Any) -> Any:
        if not query.is_meta:
            return stock(query, key, value, attn_mask, *args, **options)
        seen.attention["flash" if attn_mask is None else "masked"] += 1
        if attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, torch.is_grad_enabled())[
            0
        ]

    return attention


def pretend(seen: Seen, gib: float) -> Device:
    """Put a pretended accelerator in the place of this machine's; enter what is returned while it is to be used."""
    device = Device(seen)
    real_accelerator.ds_accelerator = Pretended(seen, int(gib * 2**30), device)
    F.scaled_dot_product_attention = _attention(seen)
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]
    # torch's fused AdamW runs wherever there is a kernel; the meta device is not on its list.
    from torch.optim import adam, adamw, optimizer

    known = optimizer._get_fused_kernels_supported_devices()
    for module in (optimizer, adam, adamw):
        if hasattr(module, "_get_fused_kernels_supported_devices"):
            module._get_fused_kernels_supported_devices = lambda: [*known, "meta"]  # type: ignore[attr-defined]
    return device
