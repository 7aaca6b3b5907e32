"""Starting the ranks of a measurement: torchrun, each rank calls one function, their answers come back as JSON.

Run as a module, this file is one of the ranks.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from ppcl_ds import launch

Device = Literal["cpu", "cuda"]

THREADS = 1
"""Threads a rank, whatever the number of ranks: one process and two are then compared at equal shares."""


def device_here() -> Device:
    """The device of a program that takes a GPU where there is one, unless `DS_ACCELERATOR=cpu` asks for the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


def run_ranks(task: str, world: int, device: Device = "cpu", **arguments: Any) -> list[Any]:
    """Call a module's function on `world` ranks of this machine.

    Args:
        task: `module:function`; the function joins the other ranks by itself and returns what JSON can hold.
        device: what the ranks compute on; a GPU each, or the CPU even where there is a GPU.
        arguments: keyword arguments for every rank, what JSON can hold.

    Returns:
        What the ranks returned, in their order.

    Raises:
        RuntimeError: a rank failed; the message is what the ranks printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "task.json").write_text(json.dumps({"task": task, "arguments": arguments}))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        done = subprocess.run(
            [*launcher, "-m", "benchmarks.ranks", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(device),
        )
        if done.returncode:
            raise RuntimeError(f"{task} on {world} ranks:\n{done.stdout}")
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(world)]


def _environment(device: Device) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": str(THREADS), "DS_ACCELERATOR": device, "PYTHONWARNINGS": "ignore"}
    # Hidden GPUs are what torch goes by; DeepSpeed goes by its own variable.
    return os.environ | ours | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def be_a_rank(folder: Path) -> None:
    """Call the function that `task.json` names and write down what it returned."""
    order = json.loads((folder / "task.json").read_text())
    module, _, function = order["task"].partition(":")
    answer = getattr(importlib.import_module(module), function)(**order["arguments"])
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(answer))
    launch.end()


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
