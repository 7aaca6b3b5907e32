"""A command's ranks on this machine: started, told to stop, and ended together."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

SAID = "PPCL_SAID"
"""Environment variable of ranks: a folder in which a fault is noted by whichever rank says it first."""

GRACE = 1.0
"""Seconds that other ranks have, after one has ended badly, to end by themselves and say why."""


def run_ranks(world: int, environment: Mapping[str, str]) -> NoReturn:
    """Run this very command line as `world` ranks, and end as they do.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP are passed on: a training stops after its step, with a checkpoint. A second
    one ends all ranks at once. When a rank ends badly, the others are ended, too; who ends this process by SIGKILL
    ends them as well, see `launch.end_with_launcher`.

    The ranks have sessions of their own: a terminal tells this process alone of Ctrl-C, and each rank is told once.

    Args:
        environment: of the ranks.
    """
    listening = socket.create_server(("127.0.0.1", 0), backlog=4 * world)
    told: list[int] = []
    kept: list[object] = []
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        for rank in ranks:
            rank.send_signal(number if len(told) == 1 else signal.SIGKILL)
        if len(told) == 1:
            print("stopping; once more to end at once", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, pass_on)
    with tempfile.TemporaryDirectory(prefix="ppcl-") as said:
        shared = {
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": listening.getsockname()[1],
            "TORCHELASTIC_USE_AGENT_STORE": True,  # what torch's rendezvous asks for where the launcher has the store
            SAID: said,
        }
        for rank in range(world):
            own = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            command = [sys.executable, *sys.orig_argv[1:]]
            ranks.append(subprocess.Popen(command, env={**environment, **own}, start_new_session=True))
            if told:  # while they were being started
                ranks[-1].send_signal(told[0])
        threading.Thread(target=_open_store, args=(listening, kept), daemon=True).start()
        code = _wait(ranks)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + told[0] if told and code else code)  # the store's threads are not waited for


def _open_store(listening: socket.socket, kept: list[object]) -> None:
    """What the ranks meet at, made while they load; those that have come already wait in the socket's queue."""
    import torch.distributed as dist

    host, port = listening.getsockname()
    kept.append(dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()))


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended; the exit code of the first that failed, as a shell has it."""
    failed, end = 0, float("inf")
    while None in [rank.poll() for rank in ranks]:
        if not failed and (bad := [rank for rank in ranks if rank.returncode]):
            failed, end = _code(bad[0], ranks.index(bad[0])), time.monotonic() + GRACE
        if time.monotonic() > end:
            for rank in ranks:
                rank.kill()
            end = float("inf")
        time.sleep(0.05)
    return failed or next((_code(rank, number) for number, rank in enumerate(ranks) if rank.returncode), 0)


def _code(rank: subprocess.Popen[bytes], number: int) -> int:
    if rank.returncode < 0:
        name = signal.Signals(-rank.returncode).name
        why = "; was there enough memory?" if name == "SIGKILL" else ""
        print(f"error: the process of rank {number} was ended by {name}{why}", file=sys.stderr, flush=True)
    return rank.returncode if rank.returncode > 0 else 128 - rank.returncode


def say_once(line: str) -> None:
    """Print a fault, unless another rank of this machine has said the same."""
    if folder := os.environ.get(SAID):
        try:
            (Path(folder) / hashlib.sha256(line.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass  # the launcher is gone, and with it the folder
    print(line, file=sys.stderr, flush=True)
