"""How a run is laid over the GPUs: the fastest of a few settings that fit, as `ppcl estimate` says."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ppcl_ds import launch
from ppcl_ds.data.batch import Size
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import ACCELERATORS, Accelerator
from ppcl_ds.estimate.estimate import size as sized
from ppcl_ds.estimate.inputs import read_inputs
from ppcl_ds.estimate.numbers import Estimate
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.teacher import Teacher

NODE = 8
"""GPUs of a node, where there are more than one node holds."""


@dataclass(frozen=True)
class Machine:
    """What a run is to run on.

    Attributes:
        gpus: of the whole run; 0: one process on the CPU.
        memory: GiB of each, or of this machine.
    """

    gpus: int
    memory: float

    @property
    def world(self) -> int:
        return max(1, self.gpus)

    @property
    def nodes(self) -> int:
        return -(-self.world // NODE)

    @property
    def accelerator(self) -> Accelerator:
        """By its memory; its speed is not asked for."""
        return ACCELERATORS["h100"].model_copy(update={"name": str(self), "memory_gib": self.memory})

    def __str__(self) -> str:
        if not self.gpus:
            return f"the CPU with {self.memory:.3g} GB"
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {self.memory:.3g} GB"


def machine(gpus: int | None, memory: float | None) -> Machine:
    """The GPUs of this machine, or as told.

    Raises:
        UserError: they are not told in full, or do not fill their nodes.
    """
    own = _own_gpus() if gpus is None or memory is None else []
    if gpus is None:
        gpus = len(own)
        if memory is not None and not gpus:
            raise UserError("--gpu-memory: this machine has no GPU; say how many there will be with --gpus")
    if gpus and memory is None:
        if not own:
            raise UserError("--gpus: this machine has none to look at; say with --gpu-memory how many GB each has")
        memory = min(own)
    if gpus > NODE and gpus % NODE:
        raise UserError(f"--gpus {gpus}: nodes of {NODE} would not be full; give a multiple of {NODE}")
    own_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine(gpus, memory if gpus and memory else own_memory)


def _own_gpus() -> list[float]:
    """GiB of each."""
    if launch.device().type != "cuda":
        return []
    import torch

    return [torch.cuda.get_device_properties(n).total_memory / 2**30 for n in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class Setting:
    """What decides how much memory a step takes."""

    micro_batch: int
    checkpointing: bool = False
    offload: bool = False
    stages: int = 1
    whole: bool = False  # the teacher, on every process


SETTINGS = (
    Setting(8),
    Setting(4),
    Setting(2),
    Setting(2, checkpointing=True),
    Setting(1),
    Setting(1, checkpointing=True),
    Setting(1, checkpointing=True, offload=True),
)
"""The fastest first: gathers of the teacher are shared by a micro-batch; checkpointing costs a third of the time of
units, an optimizer in CPU memory more."""


def fitted(
    machine: Machine, draft: Callable[[Setting], Recipe], teacher: Teacher, size: Size, alone: bool
) -> tuple[Setting, Estimate]:
    """The first of the settings that fits, on as few stages as hold the library, with the whole teacher if that fits.

    Args:
        draft: the recipe with a setting.
        size: of a sample, in pixels.
        alone: whether samples are read one by one.

    Raises:
        UserError: none fits; the message says what the least is.
    """

    def estimated(setting: Setting) -> Estimate:
        per_node = machine.world // machine.nodes
        inputs = read_inputs(draft(setting), machine.nodes, per_node, size=size, teacher=teacher)
        return sized(inputs, machine.accelerator)

    for setting in (each for each in SETTINGS if each.micro_batch == 1 or not alone):
        found = estimated(setting)
        if not found.trains and found.layouts:
            setting = replace(setting, stages=found.layouts[0].stages)
            found = estimated(setting)
        if found.trains:
            whole = replace(setting, whole=True)
            if machine.world > 1 and (with_whole := estimated(whole)).fits:
                return whole, with_whole
            return setting, found
    tried = [found, *(estimated(more) for more in _with_more_stages(setting, machine, len(found.stages[0].layers)))]
    least = math.ceil(min(each.memory.peak for each in tried) / machine.accelerator.usable_bytes * machine.memory)
    larger = found.smallest
    clip = f" and {size.frames} frames" if size.frames > 1 else ""
    each = " each" if machine.gpus > 1 else ""
    several = f", or {larger.nodes * larger.gpus_per_node} of these" if larger and machine.gpus else ""
    raise UserError(
        f"{teacher.path}: {machine} is too little to distill {teacher.class_name} at {size.height} x {size.width} "
        f"pixels{clip}, with micro_batch 1, checkpointing and offload; the least is {least} GB{each}{several}"
    )


def probing(found: Estimate, micro_batch: int) -> int:
    """Samples of a teacher forward while probing: boundaries may fill half of what the teacher leaves.

    Args:
        found: with this micro-batch.
    """
    costs, forward = found.probing, found.memory.phases["teacher forward"]
    assert costs is not None, "distilling was estimated"
    parts = [size for part, size in found.memory.resident.items() if part.startswith("teacher")]
    parts += [size for part, size in forward.items() if part != "boundaries for units"]
    room = found.accelerator.usable_bytes - sum(parts)
    sample = costs.boundaries / micro_batch
    return max(1, min(micro_batch, int(room / 2 / sample)))


def _with_more_stages(setting: Setting, machine: Machine, units: int) -> Iterator[Setting]:
    for stages in range(2, min(machine.world, units) + 1):
        if machine.world % stages == 0:
            yield replace(setting, stages=stages)
