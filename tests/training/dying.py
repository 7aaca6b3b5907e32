"""`ppcl distill` as a rank that is killed at a place of your choice: `python -m tests.training.dying distill RECIPE`.

`DIE=RANK:PLACE:COUNT` kills that rank with SIGKILL the COUNT-th time it gets to the place: `forward` (inside the
teacher's forward), `exchange` (between what it receives) or `checkpoint` (its file written by half). At the place
`data` it does not die but waits for its next micro-batch for ever; at `full` it goes on, after it has filled the disk
on which its checkpoint is to be written.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ppcl_ds.cli import main
from ppcl_ds.teacher import anatomy, noising

RANK, PLACE, COUNT = os.environ["DIE"].split(":")
passed = 0


def dies(function: Callable[..., Any], last_words: Callable[..., None] = lambda *_, **__: None) -> Callable[..., Any]:
    def until_its_time(*arguments: Any, **options: Any) -> Any:
        global passed
        passed += 1
        if os.environ.get("RANK") == RANK and passed == int(COUNT):
            last_words(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return until_its_time


def half_a_file(tensors: dict[str, torch.Tensor], path: Path, *_: Any) -> None:
    path.write_bytes(b"\0" * sum(tensor.nbytes for tensor in tensors.values()))


def fill_the_disk(write: Callable[..., Any]) -> Callable[..., Any]:
    def when_it_is_full(tensors: dict[str, torch.Tensor], path: Path, *rest: Any) -> Any:
        global passed
        passed += 1
        if os.environ["RANK"] == RANK and passed == int(COUNT):
            with suppress(OSError), (path.parents[1] / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 4096)
        return write(tensors, path, *rest)

    return when_it_is_full


if __name__ == "__main__":
    if PLACE == "forward":
        anatomy._record_exit = dies(anatomy._record_exit)
    elif PLACE == "exchange":
        dist.all_to_all_single = dies(dist.all_to_all_single)
    elif PLACE == "data":
        hangs = dies(noising.NoisyStream.with_noise, lambda *_: time.sleep(1e6))
        noising.NoisyStream.with_noise = hangs  # type: ignore[method-assign]
    else:
        from ppcl_ds.training import saver

        changed = fill_the_disk if PLACE == "full" else partial(dies, last_words=half_a_file)
        saver.write_tensors = changed(saver.write_tensors)
    main()
