"""Who watches for ranks that stand still lets those be that move, and does not depend on what it watches with.

Run as a module, this file is a rank: `TASK` says what it does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

from ppcl_ds.watch.watchdog import Watchdog

TIMEOUT = 3.0
STORE = """
import sys, time
import torch.distributed as dist
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(1000)
"""


def be_a_rank(task: str) -> None:
    if task == "lags":
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with Watchdog(TIMEOUT) as watch:
        watch.step = 7
        watch.on_phase("long")
        print("watching", flush=True)
        if task == "moves":
            for _ in range(12):
                time.sleep(TIMEOUT / 6)
                watch.alive()
        elif task == "lags":
            dist.barrier()
            watch.on_phase("data")
            if dist.get_rank() == 0:
                watch.on_phase("exchange")
            time.sleep(10 * TIMEOUT)
        else:
            time.sleep(10 * TIMEOUT)
    print("came to its end", flush=True)


def watched(task: str, lose_the_store: bool) -> tuple[int, str, float]:
    """Exit code of a rank, what it printed, and how long it ran once it was watched."""
    server = subprocess.Popen([sys.executable, "-c", STORE], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    rank = subprocess.Popen(
        [sys.executable, "-m", "tests.watch.test_watchdog", task],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
    )
    assert rank.stdout is not None
    printed = next(line for line in rank.stdout if line == "watching\n")
    began = time.monotonic()
    if lose_the_store:
        server.kill()
    printed += rank.communicate(timeout=60)[0]
    server.kill()
    server.wait()
    return rank.returncode, printed, time.monotonic() - began


def test_a_phase_may_take_longer_than_the_time_out_while_it_moves() -> None:
    code, printed, _ = watched("moves", lose_the_store=False)
    assert code == 0
    assert "came to its end" in printed
    assert "error" not in printed


def test_a_rank_that_still_moves_does_without_the_store() -> None:
    code, printed, _ = watched("moves", lose_the_store=True)
    assert code == 0
    assert "came to its end" in printed


def test_a_rank_that_stands_still_ends_though_the_store_is_gone() -> None:
    code, printed, seconds = watched("stands still", lose_the_store=True)
    assert code == 1
    assert "error: nothing has moved in phase 'long' of step 7 for 3 s" in printed
    assert "store on localhost does not answer" in printed
    assert seconds < 3 * TIMEOUT


def test_ranks_that_watch_each_other_are_not_silent() -> None:
    """Both stand still from the same moment on and look at each other at the same time."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "tests.watch.test_watchdog", "lags"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    named = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(named) == 1
    assert "rank 1 on " in named[0]
    assert "stands still in phase 'data' of step 7" in named[0]


if __name__ == "__main__":
    be_a_rank(sys.argv[1])
