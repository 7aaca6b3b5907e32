"""`ppcl distill` as a rank that is killed at a place of your choice: `python -m tests.training.dying distill RECIPE`.

`DIE=RANK:PLACE:COUNT` kills that rank with SIGKILL the COUNT-th time it gets to the place: `forward` (inside the
teacher's forward), `exchange` (between what it receives) or `checkpoint` (its file written by half). At the place
`data` it does not die but waits for its next micro-batch for ever; at `full` it goes on, after it has filled the disk
on which its checkpoint is to be written; at `held` its file is not written before it has trained on, and at `slow` that
takes eight seconds, in small pieces.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ppcl_ds.cli import main
from ppcl_ds.teacher import anatomy, noising
from ppcl_ds.training import saver
from ppcl_ds.training.tensor_file import Copied

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


def half_a_file(tensors: dict[str, Copied], path: Path, *_: Any) -> None:
    path.write_bytes(b"\0" * sum(tensor.nbytes for tensor in tensors.values()))


def fill_the_disk(write: Callable[..., Any]) -> Callable[..., Any]:
    def when_it_is_full(tensors: dict[str, Copied], path: Path, *rest: Any) -> Any:
        global passed
        passed += 1
        if os.environ["RANK"] == RANK and passed == int(COUNT):
            with suppress(OSError), (path.parents[1] / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 4096)
        return write(tensors, path, *rest)

    return when_it_is_full


def until_it_has_trained_on(write: Callable[..., Any]) -> Callable[..., Any]:
    """Eight more blocks of the teacher, of which a step runs no fewer."""
    blocks, record = threading.Semaphore(0), anatomy._record_exit

    def recorded(*arguments: Any, **options: Any) -> Any:
        blocks.release()
        return record(*arguments, **options)

    def held(*arguments: Any) -> Any:
        global passed
        passed += 1
        if os.environ["RANK"] == RANK and passed == int(COUNT):
            while blocks.acquire(blocking=False):
                pass
            for _ in range(8):
                blocks.acquire()
        return write(*arguments)

    anatomy._record_exit = recorded
    return held


def slowly(write: Callable[..., Any]) -> Callable[..., Any]:
    def piece_by_piece(tensors: dict[str, Copied], path: Path, grows: Callable[[], None]) -> Any:
        if os.environ["RANK"] == RANK:
            for _ in range(16):
                time.sleep(0.5)
                grows()
        return write(tensors, path, grows)

    return piece_by_piece


def at_once(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """What is written is on the disk before the next step, so that the place of a death says what it leaves behind."""

    def written(thread: threading.Thread) -> None:
        start(thread)
        thread.join()

    return written


if __name__ == "__main__":
    if PLACE not in ("full", "held", "slow"):
        saver._Writer.start = at_once(saver._Writer.start)  # type: ignore[method-assign, assignment]
    if PLACE == "forward":
        anatomy._record_exit = dies(anatomy._record_exit)
    elif PLACE == "exchange":
        dist.all_to_all_single = dies(dist.all_to_all_single)
    elif PLACE == "data":
        hangs = dies(noising.NoisyStream.with_noise, lambda *_: time.sleep(1e6))
        noising.NoisyStream.with_noise = hangs  # type: ignore[method-assign]
    else:
        changed = {"full": fill_the_disk, "held": until_it_has_trained_on, "slow": slowly}
        saver.write_tensors = changed.get(PLACE, partial(dies, last_words=half_a_file))(saver.write_tensors)
    main()
