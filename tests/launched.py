"""A command whose ranks do what a test asks: `python -m tests.launched CASE FOLDER`; each notes that it was there."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import typer

from ppcl_ds import console, launch
from ppcl_ds.errors import UserError

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def command(case: str, folder: Path) -> None:
    """One rank of two."""
    launch.on_ranks(2)
    rank = int(os.environ["RANK"])
    (folder / f"{rank}.{os.getpid()}").write_text(" ".join(sys.argv[1:]))
    while len(list(folder.glob("?.*"))) < 2:  # both have been started
        time.sleep(0.01)
    match case:
        case "same fault":
            raise UserError("the shard is gone")
        case "own fault":
            raise UserError(f"rank {rank} cannot write")
        case "one fault" if rank == 1:
            raise UserError("a sample is cut")
        case "killed" if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "stubborn":
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
    if case in ("one fault", "killed", "waits", "stubborn"):
        (folder / f"{rank} waits").touch()
        time.sleep(60)


if __name__ == "__main__":
    console.run(app)
