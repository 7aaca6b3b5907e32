"""Ranks run the command line that was typed, and end well, whatever threads of their process groups are still at."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import typer

from ppcl_ds import console, launch
from tests.ranks import run_ranks

app = typer.Typer()


def test_ranks_end_well_while_threads_let_go_of_tensors(tmp_path: Path) -> None:
    run_ranks("tests.test_launch", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank 0", "rank 1"]


@pytest.mark.parametrize("program", ["/usr/bin/ppcl", "/src/ppcl_ds/cli.py"])
def test_ranks_get_every_option_that_was_typed(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["finetune", "my recipe.yaml", "--variant", "small", "--from", "runs/other", "--until", "5"]
    become: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", [program, *typed])
    monkeypatch.setattr(os, "execve", lambda program, arguments, environment: become.append(arguments))
    monkeypatch.setenv("RANK", "0")
    launch.on_ranks(2)
    assert become == []
    monkeypatch.delenv("RANK")
    launch.on_ranks(2)
    assert "--nproc-per-node=2" in become[0]
    assert become[0][-len(typed) - 2 :] == ["-m", "ppcl_ds.cli", *typed]


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
