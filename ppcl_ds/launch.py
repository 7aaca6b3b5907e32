"""The processes of a run: ranks that are started on this machine, or being one that somebody else has started.

torch and DeepSpeed are imported where they are used: the commands that start no ranks need not wait for them.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ppcl_ds import launcher
from ppcl_ds.errors import UserError

if TYPE_CHECKING:
    import torch


Value = TypeVar("Value")

WAIT = 1800.0
"""Seconds that a collective may wait for a rank where nobody says otherwise."""

FILLED = 0.75
"""Share of free memory that is filled on purpose."""

_ON_CPU = 32 * 2**30
"""Most bytes of a machine's memory that are filled on purpose."""

_DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
"""One of these is there where torch finds a GPU: NVIDIA's, Jetson's, that of Windows below WSL, AMD's."""

signalled: list[int] = []
"""Signals that asked this process to leave. Python drops an exception that is raised while it closes a generator or
frees an object, and `SystemExit` with it; who can stop in order looks here, too."""


def leave_by_signal(number: int, _: object) -> NoReturn:
    """Handle SIGINT or SIGTERM: end with the exit code that shells give it."""
    signalled.append(number)
    sys.exit(128 + number)


def lost(what: sys.UnraisableHookArgs) -> None:
    """For `sys.unraisablehook`: that Python has dropped an exit is nothing to print, as `signalled` knows of it."""
    if not isinstance(what.exc_value, SystemExit):
        sys.__unraisablehook__(what)


def is_rank() -> bool:
    """Whether this process is already one of several (started by torchrun)."""
    return "RANK" in os.environ


def is_first_rank() -> bool:
    """Whether this process speaks for all of one launch; so does one that is alone."""
    return os.environ.get("RANK", "0") == "0"


def on_ranks(world: int) -> None:
    """Go on as one of `world` ranks: returns in a rank; else starts them on this machine and ends as they do."""
    if not is_rank():
        print(f"starting {world} processes", flush=True)
        launcher.run_ranks(world, _environment(world))


def check_world(world: int | None) -> None:
    """Compare the ranks that somebody else started with the recipe's topology.

    Args:
        world: so many are needed; None: any number will do.

    Raises:
        UserError: their number differs, or torchrun did not start them.
    """
    if not is_rank():
        return
    needed = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise UserError(f"RANK is set in the environment, but {missing[0]} is not; start the processes with torchrun")
    started, in_the_node = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if world is not None and started != world:
        raise UserError(f"{started} processes were started, but topology.stages x topology.replicas is {world}")
    if started % in_the_node:
        raise UserError(f"{in_the_node} of {started} processes are on this node; start equally many on each")


def _environment(world: int) -> dict[str, str]:
    defaults = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world)), "PYTHONWARNINGS": "ignore"}
    seen = gpus()
    if seen >= world:
        return defaults | os.environ
    if seen:
        print(f"{world} processes, but {seen} GPU: they run on the CPU (topology.stages x topology.replicas)")
    return defaults | os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def join(timeout: float = WAIT, *, deterministic: bool = False) -> torch.device:
    """Join the other ranks; every rank must call it first. Returns this rank's device.

    Args:
        deterministic: compute to the same bits again on a GPU, see `be_deterministic`.
        timeout: seconds that a collective may wait for a rank; twice as long counts as lost, so that whoever watches
            the ranks can name the late one first.
    """
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    if deterministic:
        be_deterministic()
    # Sends of 1F1B share a communicator with other collectives. Their order is the same on all ranks; it need not warn.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed would compile its shared-memory collectives now. We call none of them, and a compiler lock that a killed
    # build left behind would hang every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=2 * timeout))
    return torch.device(get_accelerator().current_device_name())


def be_deterministic() -> None:
    """Have this process compute to the same bits again on a GPU of the same kind; before it is first used.

    Attention's backward adds up in the order in which its threads come, unless it is told not to; cuDNN's cannot be.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once
    torch.use_deterministic_algorithms(True)  # only warning would leave attention as it is
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # we read nothing that we have not written
    torch.backends.cuda.enable_cudnn_sdp(False)


def set_timeout(timeout: float = WAIT) -> None:
    """Have every process group wait as `join` was told; groups that DeepSpeed makes have their backend's default."""
    from torch.distributed import distributed_c10d

    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=2 * timeout), group)


def room(needed: int = 0) -> int:
    """Bytes that every rank may still fill, as `own_room` has it; all ranks must call it, and are told the same."""
    return min(all_gather(own_room(needed)))


def own_room(needed: int = 0) -> int:
    """Bytes that this process may still fill: three quarters of what is free; on the CPU, of its part of that.

    Args:
        needed: bytes that will be taken by something else.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.empty_cache()  # what torch keeps for later counts as free
    free, sharers = accelerator.available_memory() - needed, 1
    if accelerator.device_name() == "cpu":  # the machine's, of which a container or a job may have less
        free, sharers = min(free, _ON_CPU), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(FILLED * free) // sharers


def gpus() -> int:
    """How many this process sees."""
    if not any(map(os.path.exists, _DRIVERS)):
        return 0
    import torch

    return torch.cuda.device_count()


def device() -> torch.device:
    """Where a process that has joined no others computes: the accelerator if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def all_gather(own: Value) -> list[Value]:
    """What every rank has, in order, on every rank; all of them must call it."""
    import torch.distributed as dist

    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    return everybody


def first_problem(own: str) -> str:
    """The problem of the first rank that has one, on every rank; empty: none has. All of them must call it."""
    return next(filter(None, all_gather(own)), "")


def end_with_parent(*_: object) -> None:
    """In a worker process: end when the process that started it ends, even where that was killed.

    A worker of a fork server is the server's child, and the server lives as long as its workers do.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker's alone"
    _end_after(parent.join)


def end_with_launcher() -> None:
    """In a rank: end when the process that started it ends, even where that was killed."""
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)

    _end_after(wait)


def _end_after(wait: Callable[[], object]) -> None:
    """End this process, whatever its other threads are at, once `wait` returns in a thread of its own."""

    def watch() -> None:
        wait()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave(code: int = 0) -> None:
    """Part from the other ranks in order.

    Raises:
        SystemExit: the code is not 0.
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    if code:
        sys.exit(code)


def has_joined() -> bool:
    """Whether this process has ever joined others: DeepSpeed keeps what it then made for as long as it is loaded."""
    return "deepspeed" in sys.modules and sys.modules["deepspeed"].comm.comm.cdb is not None


def end(code: int = 0) -> NoReturn:
    """End the process of a rank that has joined others, without taking its interpreter down.

    DeepSpeed keeps the process groups, and with them threads of gloo, each of which may hold
    the last reference to a tensor that went to another rank. Such a thread needs the interpreter to free it, and
    aborts the process where the interpreter is on its way down (https://github.com/pytorch/pytorch/pull/179291).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
