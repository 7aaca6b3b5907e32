"""Accelerators that a cluster may have, as their vendors' public data sheets describe them."""

from __future__ import annotations

import difflib
import os
import re
import time

from pydantic import BaseModel, ConfigDict

from ppcl_ds import launch
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe

RESERVED = 0.1
"""Share of the memory that is left alone: the driver's context, NCCL's buffers, fragmentation."""


class Accelerator(BaseModel):
    """One accelerator in its usual server.

    Attributes:
        name: how it is asked for.
        memory_gib: memory as its driver reports it; nearly the number that data sheets call GB.
        tflops: peak of dense bfloat16 matrix products, 10^12 FLOP/s.
        tflops64: peak of float64 matrix products, 10^12 FLOP/s.
        intra_gb: bandwidth to the other accelerators of the node, one way, 10^9 bytes/s.
        inter_gb: its share of the node's network, one way, 10^9 bytes/s.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    memory_gib: float
    tflops: float
    tflops64: float
    intra_gb: float
    inter_gb: float

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_gib * (1 - RESERVED) * 2**30)


def _named(*accelerators: Accelerator) -> dict[str, Accelerator]:
    return {accelerator.name: accelerator for accelerator in accelerators}


# NVLink and PCIe are quoted both ways together; half of it goes one way. "With sparsity" is twice the dense rate.
ACCELERATORS = _named(
    # NVIDIA A100 data sheet: 312 TFLOPS, 19.5 in float64, NVLink 600 GB/s.
    # DGX A100: eight 200 Gb/s adapters for eight GPUs.
    Accelerator(name="a100-40", memory_gib=40, tflops=312, tflops64=19.5, intra_gb=300, inter_gb=25),
    Accelerator(name="a100-80", memory_gib=80, tflops=312, tflops64=19.5, intra_gb=300, inter_gb=25),
    # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS with sparsity, 67 in float64, NVLink 900 GB/s.
    # DGX H100: eight 400 Gb/s adapters.
    Accelerator(name="h100", memory_gib=80, tflops=989, tflops64=67, intra_gb=450, inter_gb=50),
    # NVIDIA H200 data sheet, SXM: 141 GB, otherwise as H100. DGX H200: eight 400 Gb/s adapters.
    Accelerator(name="h200", memory_gib=140, tflops=989, tflops64=67, intra_gb=450, inter_gb=50),
    # NVIDIA DGX B200 data sheet: 1,440 GB for eight GPUs, NVLink 14.4 TB/s for eight, eight 400 Gb/s adapters;
    # NVIDIA Blackwell architecture brief, HGX B200: 4,500 TFLOPS with sparsity, 37 in float64.
    Accelerator(name="b200", memory_gib=179, tflops=2250, tflops64=37, intra_gb=900, inter_gb=50),
    # NVIDIA L40S data sheet: 362 TFLOPS, PCIe Gen4 64 GB/s. Float64 runs at a 64th of float32's 91.6 TFLOPS.
    # The network is an assumption: 100 Gb/s a GPU.
    Accelerator(name="l40s", memory_gib=45, tflops=362, tflops64=1.4, intra_gb=32, inter_gb=12.5),
    # NVIDIA Ada architecture white paper, RTX 4090: 165.2 TFLOPS with float32 accumulation, 1.3 in float64, PCIe Gen4
    # 64 GB/s. The network is an assumption: 100 Gb/s for a node of eight.
    Accelerator(name="rtx4090", memory_gib=24, tflops=165, tflops64=1.3, intra_gb=32, inter_gb=1.6),
    # AMD Instinct MI300X data sheet: 1,307 TFLOPS, 163 in float64, seven Infinity Fabric links of 128 GB/s.
    # Eight 400 Gb/s adapters.
    Accelerator(name="mi300x", memory_gib=192, tflops=1307, tflops64=163, intra_gb=448, inter_gb=50),
)


_USUAL = "h100"
"""What a run in bf16 is taken to be for, where nobody says and no GPU is here."""

_SIDE, _TRIES = 1024, 3
"""Of the matrices by which a CPU's speed is measured, and how often; the best counts."""


def accelerator_for(recipe: Recipe, name: str | None = None) -> tuple[Accelerator, str]:
    """The accelerator that a run is for, and how that is known: as told, the recipe's, this machine's GPU or CPU.

    Args:
        name: as told on the command line.

    Raises:
        UserError: the table does not have it.
    """
    if name:
        return accelerator_called(name), ""
    if recipe.cluster.accelerator:
        key = "cluster.accelerator"
        return accelerator_called(recipe.cluster.accelerator, key), key
    if launch.device().type == "cuda":
        return _own_gpu()
    if recipe.teacher.precision == "fp32":
        return _own_cpu(recipe.topology.world), "this machine's, shared by the processes; --accelerator for another"
    return ACCELERATORS[_USUAL], "assumed, as no GPU is here; --accelerator for another"


def _own_gpu() -> tuple[Accelerator, str]:
    """What the table has of the first GPU here, with the memory that it has, and what is to be said of it."""
    import torch

    found = torch.cuda.get_device_properties(0)
    words = found.name.lower().replace(" ", "")
    models = ((known.split("-")[0], each) for known, each in ACCELERATORS.items())
    known = next((each for model, each in models if re.search(rf"{model}(?!\d)", words)), None)
    said = "this machine's" if known else f"this machine's, taken to be as fast as {_USUAL}; --accelerator for another"
    own = {"name": found.name, "memory_gib": found.total_memory / 2**30}
    return (known or ACCELERATORS[_USUAL]).model_copy(update=own), said


def _own_cpu(processes: int) -> Accelerator:
    """A process's share of this machine; its peak is what large products of float32 reach now."""
    import torch

    matrix = torch.ones(_SIDE, _SIDE)
    seconds = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    tflops = 2 * _SIDE**3 / min(seconds) / 1e12 / processes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / processes
    # Links inside a machine are its memory's, at a few GB/s through gloo; a network of 10 Gb/s is assumed.
    return Accelerator(name="CPU", memory_gib=memory, tflops=tflops, tflops64=tflops / 2, intra_gb=2, inter_gb=1.25)


def accelerator_called(name: str, key: str = "--accelerator") -> Accelerator:
    """The accelerator of that name.

    Args:
        key: that names it.

    Raises:
        UserError: the table does not have it.
    """
    if name not in ACCELERATORS:
        near = difflib.get_close_matches(name, ACCELERATORS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(ACCELERATORS)}"
        raise UserError(f"{key} {name}: not in the table; {hint}")
    return ACCELERATORS[name]
