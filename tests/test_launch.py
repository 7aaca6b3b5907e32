"""Ranks end well, whatever threads of their process groups are still at."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import typer

from ppcl_ds import console, launch
from tests.ranks import run_ranks

app = typer.Typer()


def test_ranks_end_well_while_threads_let_go_of_tensors(tmp_path: Path) -> None:
    run_ranks("tests.test_launch", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank 0", "rank 1"]


@app.command()
def be_a_rank(folder: Path) -> None:
    """The first rank ends with work in flight that the other one does bit by bit, in the middle of the first's end.

    Every process group is still referred to, as DeepSpeed does it with its own.
    """
    launch.join()
    groups = [dist.new_group() for _ in range(32)]
    sys.modules["kept"] = groups  # type: ignore[assignment]
    first = dist.get_rank() == 0
    dist.barrier()
    with suppress(RuntimeError):  # the first rank is gone at some point
        for group in groups:
            dist.all_reduce(torch.ones(1000), group=group, async_op=first)
            time.sleep(0 if first else 0.005)
    (folder / f"rank {dist.get_rank()}").touch()


if __name__ == "__main__":
    console.run(app)
