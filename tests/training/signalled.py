"""`ppcl` whose ranks are asked to stop at a moment of your choice: `python -m tests.training.signalled distill RECIPE`.

`ASKED=RANK:SIGNAL:COUNT` sends that rank the signal the COUNT-th time that it enters a function of ours, however busy
the machine is. With `CALLS=FILE` it is sent none, and how often it entered one is written there at the end. With
`SWALLOWED=1` that is while Python closes a generator, which loses the exception that the signal raises.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ppcl_ds.cli import main

RANK, SIGNAL, COUNT = map(int, os.environ["ASKED"].split(":"))
SWALLOWED = "SWALLOWED" in os.environ
CALLS = os.environ.get("CALLS", "")
entered = 0


def count(frame: FrameType, event: str, _: Any) -> None:
    global entered
    if event == "call" and "/ppcl_ds/" in frame.f_code.co_filename:
        entered += 1
        if entered == COUNT and not CALLS:
            sys.setprofile(None)
            if SWALLOWED:
                next(signalled())  # and is closed
            else:
                os.kill(os.getpid(), SIGNAL)


def signalled() -> Iterator[None]:
    try:
        yield
    finally:
        os.kill(os.getpid(), SIGNAL)


if __name__ == "__main__":
    if os.environ.get("RANK") == str(RANK):
        sys.setprofile(count)
        if CALLS:
            atexit.register(lambda: Path(CALLS).write_text(str(entered)))
    main()
