"""Processes and ranks for tests, forked from a server that has everything imported: milliseconds each, not seconds.

`run` is `python -m MODULE ARGUMENTS`; `run_ranks` is torchrun of it on this machine. A command that would start
ranks (`launch.on_ranks`) has them forked instead. Where the launcher itself is the promise, `afresh` and `torchrun`
start what a user starts; such tests are marked `launcher`.

The server is one process for all of pytest, which it ends with. It imports, and nothing else: each request is answered
by a fork of it, the manager, which forks the processes asked for, waits, ends all when one fails, and replies.
Forks share the server's seed of string hashes, which a launcher's ranks do not: what hangs on the order of a set shows
only in tests marked `launcher`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import logging
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ppcl_ds import launcher

ADDRESS = "PPCL_TEST_SERVER"
"""Environment variable with the server's socket, for the workers of pytest-xdist."""
ROOT = Path(__file__).parents[1]
CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
IMPORTED = (
    "data_tools.cli",
    "data_tools.encode",
    "data_tools.shard",
    "deepspeed.pipe",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which every engine imports, and with it torch's compiler
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.models.transformers.transformer_sd3",
    "diffusers.optimization",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "ppcl_ds.cli",
    "ppcl_ds.demo.pipeline",
    "ppcl_ds.distill.trainer",
    "ppcl_ds.estimate.estimate",
    "ppcl_ds.evaluate.evaluate",
    "ppcl_ds.evaluate.sample",
    "ppcl_ds.export.consolidate",
    "ppcl_ds.export.lora",
    "ppcl_ds.finetune.finetune",
    "ppcl_ds.finetune.trainer",
    "ppcl_ds.planning.measure",
    "ppcl_ds.planning.planner",
    "ppcl_ds.planning.replan",
    "ppcl_ds.probing.probe",
    "torch.utils.flop_counter",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
)
TIME_IS_UP = 124
"""The exit code of a process that a test has waited for too long, as `timeout` has it."""


@dataclass(frozen=True)
class Done:
    """How a process, or all ranks together, ended and what they printed."""

    returncode: int
    stdout: str
    stderr: str


def run(
    module: str,
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> Done:
    """`python -m MODULE ARGUMENTS` in the current folder, and its ranks if it starts some.

    Args:
        env: on top of this process's environment.
        timeout: seconds.
    """
    return _ask(module, arguments, 0, env, timeout)


def run_ranks(module: str, *arguments: str | Path, world: int = 2, timeout: float = 240) -> None:
    """`python -m MODULE ARGUMENTS` as ranks on the CPU; all of them must end well."""
    done = _ask(module, arguments, world, None, timeout)
    assert done.returncode == 0, done.stdout + done.stderr


def afresh(module: str, *arguments: str | Path, env: Mapping[str, str] | None = None, timeout: float = 600) -> Done:
    """`run` in an interpreter of its own, which becomes torchrun if it starts ranks."""
    return _spawn(fresh(module, *arguments), env, timeout)


def torchrun(
    module: str, *arguments: str | Path, world: int = 2, env: Mapping[str, str] | None = None, timeout: float = 240
) -> Done:
    """`torchrun -m MODULE ARGUMENTS` on this machine, as a user starts it."""
    launcher = fresh("torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m", module)
    return _spawn([*launcher, *map(str, arguments)], env, timeout)


def fresh(module: str, *arguments: str | Path) -> list[str]:
    """The command line of `python -m MODULE ARGUMENTS`."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, as one has it that is no rank and knows no accelerator; and what is changed."""
    own = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return own | CPU | dict(changes or {})


def ranks_of(path: Path) -> list[int]:
    """Processes whose command line names this file, and that have been told which rank they are."""
    processes = psutil.process_iter(["cmdline", "environ"])
    found = [process for process in processes if str(path) in (process.info["cmdline"] or [])]
    return [process.pid for process in found if "RANK" in (process.info["environ"] or {})]


def _spawn(command: Sequence[str], env: Mapping[str, str] | None, timeout: float) -> Done:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(env)
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
            return Done(process.returncode, out, err)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks
            out, err = process.communicate(timeout=60)
            return Done(TIME_IS_UP, out, f"{err}\nthe test's time is up\n")


def _ask(
    module: str, arguments: Sequence[str | Path], world: int, env: Mapping[str, str] | None, timeout: float
) -> Done:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(start_server())
        request = {
            "module": module,
            "arguments": [str(each) for each in arguments],
            "world": world,
            "env": environment(env),
            "cwd": str(Path.cwd()),
            "folder": folder,
            "timeout": timeout,
        }
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile() as answer:
            code = int(answer.readline() or 1)
        out, err = ((Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return Done(code, out, err)


# The server


def start_server() -> str:
    """The server's socket; the first call of a pytest starts the server."""
    if ADDRESS not in os.environ:
        folder = tempfile.mkdtemp(prefix="ranks")
        address = f"{folder}/socket"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", address],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment({"PYTHONWARNINGS": "ignore"}),
        )
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the server of tests/ranks.py has not started; what it printed stands above")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        atexit.register(process.kill)
        os.environ[ADDRESS] = address
    return os.environ[ADDRESS]


def serve(address: str) -> None:
    """Import everything, then fork a manager for every request, until standard input closes."""
    from ppcl_ds.console import CHATTY

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in IMPORTED:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork would lose {len(threads) - 1} threads that imports have started"
    gc.collect()
    gc.freeze()  # else a fork that collects garbage, as DeepSpeed asks it to, would look at a million objects more
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [], 1.0)
            _reap()
            if sys.stdin in ready:
                return
            if listener not in ready:
                continue
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                os._exit(_manage(connection))
            connection.close()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _manage(connection: socket.socket) -> int:
    """Answer one request; the only thread of a fresh fork of the server."""
    with connection.makefile("rw") as channel:
        request = json.loads(channel.readline())
        folder, end = Path(request["folder"]), time.monotonic() + request["timeout"]
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        code, world = 1, request["world"]
        try:
            if not world:
                code = _wait([_fork(request, {})], end, folder, connection)
                asked = folder / "world"
                world = int(asked.read_text()) if asked.exists() else 0
            if world:
                code = _launch(request, world, end, connection)
        except Exception:
            _say(folder, traceback.format_exc())
        channel.write(f"{code}\n")
    return 0


def _launch(request: dict[str, Any], world: int, end: float, connection: socket.socket) -> int:
    """What the launcher does on one node: a rendezvous store, and the ranks."""
    port = socket.socket()
    port.bind(("127.0.0.1", 0))
    port.listen(64)
    shared = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port.getsockname()[1],
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "PPCL_SAID": request["folder"],  # as ppcl_ds/launcher.py has it
    }
    ranks_own = [{k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(world)]
    ranks = [_fork(request, own, closes=port) for own in ranks_own]
    import torch.distributed as dist

    # After the forks, as it has threads.
    store = dist.TCPStore(
        "127.0.0.1", port.getsockname()[1], is_master=True, wait_for_workers=False, master_listen_fd=port.detach()
    )
    code = _wait(ranks, end, Path(request["folder"]), connection)
    del store
    return code if code >= 0 else 128 - code


def _wait(processes: Sequence[int], end: float, folder: Path, connection: socket.socket) -> int:
    """Wait for all; when one fails, time is up or nobody waits for the answer, end the others.

    Returns:
        The exit code of the first that failed.
    """
    alive, failed = set(processes), 0
    while alive:
        for process in list(alive):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                alive.discard(process)
                code = os.waitstatus_to_exitcode(status)
                if code and not failed:
                    failed = code
                    if code < 0:
                        _say(folder, f"process {processes.index(process)} was ended by {signal.Signals(-code).name}")
                    end = min(end, time.monotonic() + launcher.GRACE)
        if alive and time.monotonic() > end:
            if not failed:
                _say(folder, "the test's time is up")
            failed = failed or TIME_IS_UP
            _signal(alive, signal.SIGKILL)
            end = float("inf")
        if select.select([connection], [], [], 0.005)[0]:  # pytest has been killed
            _signal(alive, signal.SIGKILL)
    return failed


def _say(folder: Path, line: str) -> None:
    with suppress(FileNotFoundError), (folder / "stderr").open("a") as err:
        err.write(f"\n{line}\n")


def _signal(processes: set[int], number: int) -> None:
    for process in processes:
        os.killpg(process, number)


def _fork(request: dict[str, Any], own: Mapping[str, str], closes: socket.socket | None = None) -> int:
    """Fork a process that runs the module; its number."""
    process = os.fork()
    if process:
        os.setpgid(process, process)  # with whatever it starts; it has not become another program yet
        return process
    try:
        os.setpgid(0, 0)
        if closes is not None:
            closes.close()
        _become(request, own)
        code = _run(request["module"])
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _become(request: dict[str, Any], own: Mapping[str, str]) -> None:
    """What a fresh interpreter would have: arguments, environment, folder, streams, random state."""
    import numpy as np
    import torch

    from ppcl_ds import launch

    os.environ.clear()
    os.environ.update(request["env"] | own)
    os.chdir(request["cwd"])
    sys.argv = [request["module"], *request["arguments"]]
    folder = Path(request["folder"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    for handled in (signal.SIGINT, signal.SIGTERM):
        signal.signal(handled, signal.SIG_DFL)
    random.seed()
    np.random.seed(None)
    torch.manual_seed(torch.default_generator.initial_seed())
    warnings.simplefilter("ignore")  # as ranks do

    def on_ranks(world: int) -> None:
        if not launch.is_rank():
            (folder / "world").write_text(str(world))
            raise SystemExit(0)

    launch.on_ranks = on_ranks


def _run(module: str) -> int:
    """`python -m MODULE`; its exit code."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as way_out:
        if isinstance(way_out.code, str):
            print(way_out.code, file=sys.stderr)
            return 1
        return int(way_out.code or 0)
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
