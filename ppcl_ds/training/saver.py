"""Writing and loading a run's checkpoints: all ranks at once, each its own share, while the training goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from torch import Tensor

from ppcl_ds import launch
from ppcl_ds.atomic import atomic_write, fsync
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import checkpoint_tag
from ppcl_ds.training.checkpoint import POOL, Checkpoint, Contents, Piece, SavedUnit, newest_checkpoint
from ppcl_ds.training.engine import StudentsEngine
from ppcl_ds.training.tensor_file import Copied, copied, write_tensors

_LOOK = 0.2
"""Seconds between looks at how far everybody's file is, where it is waited for."""


class _Writer(threading.Thread):
    """Writes this rank's file of a checkpoint from copies, beside the training.

    Attributes:
        problem: why there is no file; empty: it is on the disk, once the thread has ended.
        fault: what ended the thread, if it is none of the disk's.
        pieces: how many are on the disk.
    """

    def __init__(self, tensors: dict[str, Copied], path: Path, contents: Contents) -> None:
        super().__init__(daemon=True)
        self.tensors, self.path, self.contents = tensors, path, contents
        self.problem = ""
        self.fault: Exception | None = None
        self.pieces = 0
        accelerator: Any = get_accelerator()
        self.copied = accelerator.Event() if accelerator.Event is not None else None
        if self.copied is not None:
            self.copied.record(accelerator.current_stream())

    def run(self) -> None:
        try:
            if self.copied is not None:
                self.copied.synchronize()
            write_tensors(self.tensors, self.path, self._grows)
            fsync(self.path)
        except (OSError, SafetensorError) as fault:
            self.problem = _words(self.path.parents[1], fault)
        except Exception as fault:  # it must not pass for a whole file
            self.fault = fault
        self.tensors = {}

    def _grows(self) -> None:
        self.pieces += 1


class Saver:
    """Writes and loads the checkpoints of a run; every rank makes one, and all make every call together.

    Args:
        folder: of all checkpoints.
        keep: so many of the newest stay.
        alive: called while it gets on.
        group: all ranks, over gloo: whether all have written is asked after each step, and no accelerator waited for.
        made: what this rank's next samples after a step are made from: name -> float32 tensor.

    Attributes:
        pools: what all ranks had of that, once a checkpoint has been loaded.
        writer: of the checkpoint that is being written.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        engine: StudentsEngine,
        alive: Callable[[], None],
        group: dist.ProcessGroup | None = None,
        made: Callable[[int], dict[str, Tensor]] = lambda step: {},
    ) -> None:
        self.made = made
        self.pools: dict[str, Tensor] = {}
        self.folder, self.keep, self.engine, self.alive, self.group = folder, keep, engine, alive, group
        self.writer: _Writer | None = None
        self.file = f"rank-{dist.get_rank():05d}.safetensors"

    def save(self, step: int, last: bool) -> None:
        """Begin a checkpoint, which is written while the training goes on; the last one is waited for.

        Raises:
            UserError: the last one cannot be written; older ones are there.
        """
        if self.writer is not None:
            self._say(*self.end())
        problem = self.begin(step)
        if last and not problem:
            _, problem = self.end()
        if problem and last:
            raise UserError(f"{problem}; make room and run the same command: it goes on from the last checkpoint")
        self._say(step, problem)

    def go_on(self) -> None:
        """Make a checkpoint of what is being written, if all of it is on the disk; to be called after each step."""
        if self.writer is not None and self._everybodys()[0] == dist.get_world_size():
            self._say(*self.end())

    def _say(self, step: int, problem: str) -> None:
        if problem and dist.get_rank() == 0:
            print(f"warning: no checkpoint of step {step}: {problem}; training goes on", flush=True)

    def begin(self, step: int) -> str:
        """Copy what a checkpoint holds, and have it written; the one before must have been ended.

        It is filled under another name, and gets its own once every rank's file is on the disk; `latest` names it last.

        Returns:
            Empty; or why there will be none (its folder cannot be made), the same on every rank.
        """
        assert self.writer is None
        partial = self.folder / f"{checkpoint_tag(step)}.partial"
        if dist.get_rank() == 0:
            for left in self.folder.glob("*.partial"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier()
        if problem := launch.first_problem(self._attempt(partial.mkdir, parents=True, exist_ok=True)):
            return problem
        contents = Contents(step=step, units=self._units_of_all())
        self.writer = _Writer(self._own(step), partial / self.file, contents)
        self.writer.start()
        return ""

    def end(self) -> tuple[int, str]:
        """Wait until everybody's file is on the disk, and make a checkpoint of them.

        Returns:
            Its step; and empty, or why there is none (the disk is full), the same on every rank. Older ones are
            untouched then.
        """
        assert self.writer is not None
        before = 0
        while True:
            ended, pieces = self._everybodys()
            if ended == dist.get_world_size():
                break
            if pieces > before:  # a rank that is done says so, too, while it waits for the others
                self.alive()
            before = pieces
            self.writer.join(_LOOK)
        writer, self.writer = self.writer, None
        if writer.fault is not None:
            raise writer.fault
        partial, step = writer.path.parent, writer.contents.step
        problem = launch.first_problem(writer.problem)
        if dist.get_rank() == 0 and not problem:
            problem = self._attempt(self._publish, partial, writer.contents)
        problem = launch.first_problem(problem)
        self.alive()
        if dist.get_rank() == 0:
            self._forget(partial if problem else None, step)
        return step, problem

    def _everybodys(self) -> tuple[int, int]:
        """How many ranks are done with their file, and how many pieces all have written."""
        assert self.writer is not None
        own = torch.tensor([not self.writer.is_alive(), self.writer.pieces])
        dist.all_reduce(own, group=self.group)
        ended, pieces = own.tolist()
        return ended, pieces

    def _forget(self, failed: Path | None, step: int) -> None:
        """Delete what is no checkpoint, and the oldest ones."""
        if failed is not None:
            shutil.rmtree(failed, ignore_errors=True)
            return
        # Only older ones: a run that was sent back by hand keeps what lies ahead of it until it gets there.
        numbers = sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*[0-9]"))
        older = [number for number in numbers if number < step]
        for number in older[: max(0, len(older) + 1 - self.keep)]:
            shutil.rmtree(self.folder / checkpoint_tag(number), ignore_errors=True)

    def _attempt(self, write: Callable[..., None], *arguments: Any, **options: Any) -> str:
        try:
            write(*arguments, **options)
            self.alive()
        except (OSError, SafetensorError) as fault:
            return _words(self.folder, fault)
        return ""

    def _shares(self) -> Iterator[tuple[str, Tensor, int, int]]:
        """Of each part of this rank's stage: name, this replica's master, and which elements of the part it holds."""
        replica = self.engine.grid.get_data_parallel_rank()
        optimizer = self.engine.optimizer
        for name, parameters, master in zip(optimizer.names, optimizer.bf16_groups, optimizer.masters, strict=True):
            start, whole = replica * master.numel(), sum(p.numel() for p in parameters)
            yield name, master, min(start, whole), min(start + master.numel(), whole)

    def _own_shares(self) -> Iterator[tuple[str, Tensor, int, int]]:
        copies = self.engine.module.copies
        return (share for share in self._shares() if share[0] not in copies)

    def _own(self, step: int) -> dict[str, Copied]:
        """Copies of what this rank's file holds."""
        optimizer = self.engine.optimizer
        tensors = {"random": torch.get_rng_state()}
        tensors |= {f"{POOL}{name}": tensor for name, tensor in self.made(step).items()}
        if torch.cuda.is_available():
            tensors["random_accelerator"] = get_accelerator().get_rng_state()
        for name, master, start, stop in self._own_shares():
            tensors[f"{name}/master"] = master.data[: stop - start]
            for what, state in optimizer.state.get(master, {}).items():
                tensors[f"{name}/{what}"] = state[: stop - start] if state.dim() else state
        return {name: copied(tensor) for name, tensor in tensors.items()}

    def _units_of_all(self) -> dict[str, SavedUnit]:
        """Every part with the pieces that all ranks hold."""
        skipped, trained = self.engine.optimizer.skipped, self.engine.module.trained
        own = {}
        for name, _, start, stop in self._own_shares():
            shapes = {key: list(parameter.shape) for key, parameter in trained[name].items()}
            piece = Piece(file=self.file, start=start, stop=stop)
            own[name] = SavedUnit(parameters=shapes, pieces=[piece], skipped=skipped[name])
        units: dict[str, SavedUnit] = {}
        for name, unit in (item for part in launch.all_gather(own) for item in part.items()):
            units.setdefault(name, unit.model_copy(update={"pieces": []})).pieces.extend(unit.pieces)
        return units

    def _publish(self, partial: Path, contents: Contents) -> None:
        """Turn the filled folder into the newest checkpoint."""
        atomic_write(partial / "checkpoint.json", contents.model_dump_json(indent=1))
        tag = checkpoint_tag(contents.step)
        shutil.rmtree(self.folder / tag, ignore_errors=True)
        partial.rename(self.folder / tag)
        fsync(self.folder)
        atomic_write(self.folder / "latest", tag)

    def load(self) -> int:
        """Load the newest checkpoint, each rank its own share, whatever the topology was. Returns its step.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        checkpoint = newest_checkpoint(self.folder)
        step, optimizer, schedule = checkpoint.contents.step, self.engine.optimizer, self.engine.lr_scheduler
        for name, master, start, stop in self._shares():
            if name not in checkpoint.contents.units and name in self.engine.module.copies:
                continue  # nothing that was ever written
            master.data[: stop - start] = checkpoint.part(name, "master", start, stop)
            steps = checkpoint.steps_of(name)
            if steps is not None:  # else it has skipped every one so far
                state = {"step": steps.to(master.device)}
                for what in checkpoint.moments_of(name):
                    state[what] = torch.zeros_like(master)
                    state[what][: stop - start] = checkpoint.part(name, what, start, stop)
                optimizer.state[master] = state
            optimizer.skipped[name] = checkpoint.contents.units[name].skipped
        optimizer.update_lp_params()
        self.pools = checkpoint.found(POOL)
        self._restore_random_state(checkpoint)
        schedule.last_epoch = self.engine.global_steps = step
        for group, base, rule in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * rule(step)
        return step

    def _restore_random_state(self, checkpoint: Checkpoint) -> None:
        """Of the rank of the same number; one that is new starts with a state of its own (nothing here draws on it)."""
        if (checkpoint.folder / self.file).exists():
            state, accelerator = (checkpoint.read(self.file, key) for key in ("random", "random_accelerator"))
            if state is not None:
                torch.set_rng_state(state)
            if accelerator is not None and torch.cuda.is_available():
                get_accelerator().set_rng_state(accelerator)


def _words(folder: Path, fault: Exception) -> str:
    return f"rank {dist.get_rank()} cannot write into {folder}: {fault}"
