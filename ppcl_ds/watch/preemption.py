"""Preemption: on a signal or RUN/STOP all ranks stop after the same step, with a checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from ppcl_ds import launch

_STOP = 1
"""What is asked by the file; every other wish is the number of a signal."""


def stop_file(run: Path) -> Path:
    """Whoever makes this file (`touch RUN/STOP`) ends the run after its next step; the next start removes it."""
    return run / "STOP"


def noticed() -> bool:
    """Whether Slurm's notice has come: SIGUSR1, which `slurm/ranks.sh` blocks, so that it stays pending."""
    return signal.SIGUSR1 in signal.sigpending()


class Preemption:
    """Every rank makes one, and all ask it after every step.

    Slurm's notice is SIGUSR1. The launcher (`slurm/ranks.sh`) blocks it for everything that it starts, so it ends no
    rank, reader or helper, wherever it arrives and however often, and a rank finds it pending when it looks.
    SIGINT and SIGTERM are kept from now on, and so is one that came before and has not ended the process; a second
    one ends it at once.

    Args:
        run: the run folder. A `STOP` in it is of an earlier run and removed, unless Slurm may have been told by it
            while the job was waiting.
        folder: the training's; `stopped` in it will say what ended it early, for the job's script.

    Attributes:
        exit_code: of the process, once all have stopped: 130 after SIGINT, 143 after SIGTERM, else 0.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self.file, self.note = stop_file(run), folder / "stopped"
        self.group = dist.new_group(backend="gloo")
        self.asked = 0
        self.exit_code = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._keep)
        self.asked = self.asked or next(iter(launch.signalled), 0)
        if dist.get_rank() == 0:
            self.note.unlink(missing_ok=True)
            if self.file.exists() and "SLURM_JOB_ID" not in os.environ:
                self.file.unlink()
                print(f"{self.file} was of an earlier run and has been removed", flush=True)

    def _keep(self, number: int, _: object) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = number

    def requested(self, step: int) -> bool:
        """Whether the run ends after this step, the same on every rank; all must ask, and write a checkpoint if so."""
        first = dist.get_rank() == 0
        own = self.asked or (_STOP if first and self.file.exists() else 0)
        wish = torch.tensor(own or (signal.SIGUSR1 if noticed() else 0))
        dist.all_reduce(wish, dist.ReduceOp.MAX, self.group)
        number = int(wish)
        if number and first:
            why = self.file if number == _STOP else signal.Signals(number).name
            print(f"stops after step {step} ({why}), with a checkpoint; the same command goes on from it", flush=True)
            self.note.write_text("STOP\n" if number == _STOP else "signal\n")
        if number in (signal.SIGINT, signal.SIGTERM):
            self.exit_code = 128 + number
        return bool(number)
