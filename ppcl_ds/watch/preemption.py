"""Preemption: on SIGUSR1 or RUN/STOP all ranks stop after the same step, with a checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path

import torch
import torch.distributed as dist


def stop_file(run: Path) -> Path:
    """Whoever makes this file (`touch RUN/STOP`) ends the run after its next step; `ppcl submit` removes it."""
    return run / "STOP"


class Preemption:
    """Every rank makes one, and all ask it after every step.

    Slurm's notice is SIGUSR1. The launcher (`slurm/ranks.sh`) blocks it for everything that it starts, so it ends no
    rank, reader or helper, wherever it arrives and however often, and a rank finds it pending when it looks.

    Args:
        run: the run folder.
        folder: the training's; `stopped` in it will say what ended it early, for the job's script.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self.file, self.note = stop_file(run), folder / "stopped"
        self.group = dist.new_group(backend="gloo")
        if dist.get_rank() == 0:
            self.note.unlink(missing_ok=True)

    def requested(self, step: int) -> bool:
        """Whether the run ends after this step, the same on every rank; all must ask, and write a checkpoint if so."""
        first = dist.get_rank() == 0
        wish = torch.tensor(2 if first and self.file.exists() else int(signal.SIGUSR1 in signal.sigpending()))
        dist.all_reduce(wish, dist.ReduceOp.MAX, self.group)
        if wish and first:
            why = "STOP" if wish == 2 else "signal"
            print(
                f"stops after step {step} ({self.file if why == 'STOP' else 'SIGUSR1'}), with a checkpoint", flush=True
            )
            self.note.write_text(why + "\n")
        return bool(wish)
