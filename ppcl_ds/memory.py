"""The accelerator's memory: how torch hands it out, how much there is, and one line where it was not enough."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from ppcl_ds.errors import UserError
from ppcl_ds.sections import Teacher, Training

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables that torch reads; the first is today's name, the second that of releases before 2.11, of which
some know the first and do nothing with it for CUDA (pytorch/pytorch#183387)."""

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
"""What other errors than torch's own say of it: the driver of pinned memory, NCCL, torch's allocator on the CPU."""


def set_allocator() -> None:
    """Have torch's allocator grow its segments, unless the user's environment says how it is to work.

    To be called before the accelerator is first used. Shapes change with every micro-batch (buckets, captions), and
    memory of one size cannot be handed out for another unless segments grow.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        release = tuple(map(int, re.findall(r"\d+", version("torch"))[:2]))
        os.environ[_ALLOCATOR[release < (2, 11)]] = "expandable_segments:True"


def free_bytes() -> int | None:
    """What is free on this process's accelerator, what torch holds in reserve included; None: there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Where memory is not enough inside, say of which phase that was; of phases in each other, the inner one counts."""
    try:
        yield
    except RuntimeError as fault:
        if is_out_of_memory(fault) and not hasattr(fault, "phase"):
            fault.phase = name  # type: ignore[attr-defined]
        raise


@contextmanager
def told(command: str, lower: str) -> Iterator[None]:
    """Where memory is not enough inside, end in one line.

    It says the same on every rank, so that it is printed once.

    Args:
        command: what runs inside.
        lower: what takes less memory, in words.

    Raises:
        UserError: the line.
    """
    try:
        yield
    except RuntimeError as fault:
        if not is_out_of_memory(fault):
            raise
        where = f"in phase '{fault.phase}'" if hasattr(fault, "phase") else "at its start"
        raise UserError(f"{command}: out of memory {where}; {lower}") from fault


def training_lower(section: str, settings: Training, teacher: Teacher) -> str:
    """What takes less memory in a training, in words.

    Args:
        section: of the recipe.
    """
    whole = teacher.ranks_per_copy == 1
    unused = {
        "leave teacher.ranks_per_copy out": whole,
        f"set {section}.activation_checkpointing": not settings.activation_checkpointing,
        f"set {section}.optimizer.offload": not settings.optimizer.offload,
        f"lower {section}.micro_batch": settings.micro_batch > 1,
        "set teacher.offload: cpu": not whole and not teacher.offload,
    }
    ways = [way for way, open_still in unused.items() if open_still]
    return ", ".join([*ways, "plan fewer units" if section == "distill" else "train fewer parts"]) + (
        ", or use more topology.stages"
    )


def is_out_of_memory(fault: RuntimeError) -> bool:
    """Whether an error means that there was no memory left."""
    import torch

    said = str(fault).lower()
    return isinstance(fault, torch.OutOfMemoryError) or any(words in said for words in _OUT_OF_MEMORY)
