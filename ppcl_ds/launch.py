"""Starting the processes of a run: torchrun on this machine, or as one of the ranks that somebody else started.

torch and DeepSpeed are imported where they are used: the commands that start no ranks need not wait for them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ppcl_ds.errors import UserError

if TYPE_CHECKING:
    import torch


def is_rank() -> bool:
    """Whether this process is already one of several (started by torchrun)."""
    return "RANK" in os.environ


def start_ranks(arguments: Sequence[str], world: int) -> NoReturn:
    """Become the torchrun that runs `ppcl ARGUMENTS` as `world` ranks on this machine.

    This process is replaced, so that who stops it stops torchrun, and torchrun its ranks: none is left behind.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    sys.stdout.flush()
    os.execve(sys.executable, [*command, "-m", "ppcl_ds.cli", *arguments], _environment(world))


def check_world(world: int) -> None:
    """Compare the ranks that somebody else started with the recipe's topology.

    Raises:
        UserError: their number differs.
    """
    started = int(os.environ.get("WORLD_SIZE", world))
    if is_rank() and started != world:
        raise UserError(f"{started} processes were started, but topology.stages x topology.replicas is {world}")


def _environment(world: int) -> dict[str, str]:
    import torch

    defaults = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world)), "PYTHONWARNINGS": "ignore"}
    gpus = torch.cuda.device_count()
    if gpus >= world:
        return defaults | os.environ
    if gpus:
        print(f"{world} processes, but {gpus} GPU: they run on the CPU (topology.stages x topology.replicas)")
    return defaults | os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def join() -> torch.device:
    """Join the other ranks; every rank must call it first. Returns this rank's device."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed would compile its shared-memory collectives now. We call none of them, and a compiler lock that a killed
    # build left behind would hang every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False)
    return torch.device(get_accelerator().current_device_name())


def leave() -> None:
    """Part from the other ranks in order."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
