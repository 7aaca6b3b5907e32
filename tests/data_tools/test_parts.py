"""Promises of `ppcl-data encode` and `shard` in several processes, machines and job array tasks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path

import psutil
import pytest
from pydantic import BaseModel

from data_tools.work import own_part, spread, worker_number
from ppcl_ds.console import Advance
from ppcl_ds.errors import UserError
from tests.data_tools.conftest import Command, abandon, tree, write_recipe
from tests.ranks import environment, fresh, run, run_ranks


@pytest.fixture
def sharded(project: Path, ppcl_data: Command) -> Path:
    """A project with seven raw shards and what one process makes of them, in `alone`."""
    write_recipe(project, samples_per_shard=5, heldout=0.2)
    ppcl_data("shard", project)
    ppcl_data("encode", project)
    (project / "shards" / "encoded").rename(project / "alone")
    return project


def test_parts_in_any_order_make_what_one_process_makes(sharded: Path, ppcl_data: Command) -> None:
    alone, encoded = tree(sharded / "alone"), sharded / "shards" / "encoded"
    for order in list(permutations((1, 2, 3)))[::2]:
        first = ppcl_data("encode", sharded, "--part", f"{order[0]}/3")
        assert "shards of other parts are still missing" in first
        assert not (encoded / "index.json").exists()
        again = ppcl_data("encode", sharded, "--part", f"{order[0]}/3")
        assert "still missing" in again
        ppcl_data("encode", sharded, "--part", f"{order[1]}/3")
        ppcl_data("encode", sharded, "--part", f"{order[2]}/3")
        assert tree(encoded) == alone
        for part in order:
            assert "already" in ppcl_data("encode", sharded, "--part", f"{part}/3")
        assert tree(encoded) == alone
        for path in encoded.rglob("*.*"):
            path.unlink()


def test_parts_at_the_same_time_and_twice_over(sharded: Path) -> None:
    parts = ("1/2", "2/2", "1/1")
    encode = partial(run, "data_tools.cli", "encode", sharded / "recipe.yaml", "--part")
    with ThreadPoolExecutor(len(parts)) as pool:
        running = list(pool.map(encode, parts))
    assert [done.returncode for done in running] == [0] * len(parts), running
    assert tree(sharded / "shards" / "encoded") == tree(sharded / "alone")


@dataclass(frozen=True)
class Turn:
    """A job that says which worker did it."""

    number: int
    samples: int = 1

    @property
    def key(self) -> str:
        return str(self.number)


class Worker(BaseModel):
    process: int
    number: int


def say_worker(job: Turn, advance: Advance) -> Worker:
    time.sleep(0.05)
    return Worker(process=os.getpid(), number=worker_number())


def test_every_worker_has_a_number_of_its_own() -> None:
    said = spread(say_worker, [Turn(number) for number in range(12)], "counting", 3)
    numbers = {worker.process: worker.number for worker in said}
    assert len(set(numbers.values())) == len(numbers) > 1
    assert set(numbers.values()) <= {0, 1, 2}
    assert all(numbers[worker.process] == worker.number for worker in said)


def test_torchrun_divides_the_shards(sharded: Path) -> None:
    run_ranks("data_tools.cli", "encode", sharded / "recipe.yaml")
    assert tree(sharded / "shards" / "encoded") == tree(sharded / "alone")


@pytest.mark.parametrize(
    ("launched", "expected"),
    [
        ({}, (1, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (4, 8)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "6"}, (2, 6)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "10",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "5",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            (3, 4),
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "RANK": "1",
                "WORLD_SIZE": "4",
            },
            (6, 12),
        ),
    ],
)
def test_slurm_and_torchrun_say_which_part_it_is(
    monkeypatch: pytest.MonkeyPatch, ppcl_data: Command, launched: dict[str, str], expected: tuple[int, int]
) -> None:
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert own_part() == expected
    rank, ranks = int(launched.get("RANK", "0")), int(launched.get("WORLD_SIZE", "1"))
    assert own_part("2/3") == (ranks + rank + 1, 3 * ranks), "what the user says comes first; ranks divide it"


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_a_part_that_does_not_exist_is_refused(part: str) -> None:
    with pytest.raises(UserError, match="--part"):
        own_part(part)


def test_a_job_array_with_gaps_must_say_its_parts(monkeypatch: pytest.MonkeyPatch, ppcl_data: Command) -> None:
    for name, value in {"ID": "7", "MIN": "3", "COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(UserError, match="gaps"):
        own_part()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_command_that_is_killed(sharded: Path, ppcl_data: Command, how: int) -> None:
    # Whoever encodes takes its time, so that the kill comes in the middle.
    slow = sharded / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'data_tools.coder' and 'forkserver' in ' '.join(sys.orig_argv):\n"
        "            import safetensors.torch as s\n"
        "            save = s.save\n"
        "            s.save = lambda *a, **k: (time.sleep(0.3), save(*a, **k))[1]\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    process = subprocess.Popen(
        fresh("data_tools.cli", "encode", sharded / "recipe.yaml", "--workers", "2"),
        env=environment({"PYTHONPATH": str(slow)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    encoded = sharded / "shards" / "encoded"
    give_up = time.monotonic() + 60
    while not list(encoded.glob("*.tar.*.partial")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not (encoded / "index.json").exists()
    abandon(encoded)
    ppcl_data("encode", sharded)
    assert tree(encoded) == tree(sharded / "alone")
