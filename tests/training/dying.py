"""`ppcl distill` as a rank that is killed at a place of your choice: `python -m tests.training.dying distill RECIPE`.

`DIE=RANK:PLACE:COUNT` kills that rank with SIGKILL the COUNT-th time it gets to the place: `forward` (inside the
teacher's forward), `exchange` (between what it receives) or `checkpoint` (its file written by half). At the place
`data` it does not die but waits for its next micro-batch for ever.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ppcl_ds.cli import main
from ppcl_ds.data import noising
from ppcl_ds.teacher import anatomy

RANK, PLACE, COUNT = os.environ["DIE"].split(":")
passed = 0


def dies(function: Callable[..., Any], last_words: Callable[..., None] = lambda *_, **__: None) -> Callable[..., Any]:
    def until_its_time(*arguments: Any, **options: Any) -> Any:
        global passed
        passed += 1
        if os.environ["RANK"] == RANK and passed == int(COUNT):
            last_words(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return until_its_time


def half_a_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(b"\0" * sum(tensor.nbytes for tensor in tensors.values()))


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

        saver.save_file = dies(saver.save_file, half_a_file)
    main()
