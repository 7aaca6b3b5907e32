"""Who watches for ranks that stand still lets those be that move, and does not depend on what it watches with.

Run as a module, this file is a rank: `TASK` says what it does.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ppcl_ds.watch.watchdog import Watchdog
from tests.ranks import Done, run, torchrun

TIMEOUT = 3.0


def be_a_rank(task: str, watching: Path) -> None:
    if task == "lags":
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if task == "remembers":  # as torch does where it has NCCL
        torch._C._distributed_c10d._dump_nccl_trace = lambda: b"the last collectives"  # type: ignore[attr-defined]
    with Watchdog(TIMEOUT, watching.with_name("flights")) as watch:
        watch.step = 7
        watch.on_phase("long")
        watching.touch()
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


def watched(task: str, folder: Path, lose_the_store: bool) -> tuple[Done, float]:
    """How a rank ended, and how long it ran once it was watched."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    with ThreadPoolExecutor(1) as pool:
        rank = pool.submit(run, "tests.watch.test_watchdog", task, folder / "watching", env=address, timeout=60)
        while not (folder / "watching").exists():
            assert not rank.done(), rank.result()
            time.sleep(0.02)
        began = time.monotonic()
        if lose_the_store:
            del store
        return rank.result(), time.monotonic() - began


def test_a_phase_may_take_longer_than_the_time_out_while_it_moves(tmp_path: Path) -> None:
    done, _ = watched("moves", tmp_path, lose_the_store=False)
    assert done.returncode == 0
    assert "came to its end" in done.stdout
    assert "error" not in done.stderr


def test_a_rank_that_still_moves_does_without_the_store(tmp_path: Path) -> None:
    done, _ = watched("moves", tmp_path, lose_the_store=True)
    assert done.returncode == 0
    assert "came to its end" in done.stdout


def test_a_rank_that_stands_still_ends_though_the_store_is_gone(tmp_path: Path) -> None:
    done, seconds = watched("stands still", tmp_path, lose_the_store=True)
    assert done.returncode == 1
    assert "error: nothing has moved in phase 'long' of step 7 for 3 s" in done.stderr
    assert "store on localhost does not answer" in done.stderr
    assert seconds < 3 * TIMEOUT


def test_a_rank_that_ends_leaves_what_nccl_remembers(tmp_path: Path) -> None:
    done, _ = watched("remembers", tmp_path, lose_the_store=False)
    assert done.returncode == 1
    assert "error: every rank: nothing has moved in phase 'long'" in done.stderr
    assert (tmp_path / "flights" / "flight_recorder_0").read_bytes() == b"the last collectives"


@pytest.mark.launcher
def test_ranks_that_watch_each_other_are_not_silent(tmp_path: Path) -> None:
    """Both stand still from the same moment on and look at each other at the same time."""
    done = torchrun("tests.watch.test_watchdog", "lags", tmp_path / "watching", timeout=100)
    assert done.returncode != 0
    named = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(named) == 1
    assert "rank 1 on " in named[0]
    assert "stands still in phase 'data' of step 7" in named[0]


if __name__ == "__main__":
    be_a_rank(sys.argv[1], Path(sys.argv[2]))
