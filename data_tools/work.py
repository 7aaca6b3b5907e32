"""What the five commands share: shards spread over processes and parts, results and files that survive a kill."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel

from ppcl_ds.atomic import fsync
from ppcl_ds.console import Advance, progress
from ppcl_ds.errors import UserError
from ppcl_ds.launch import end_with_parent

_ABANDONED = 3600.0
"""Seconds after which nobody is still at work on a file that has not changed."""


class Job(Protocol):
    """Work on one shard."""

    @property
    def key(self) -> str:
        """What tells the job apart from any other, were it to be done again: name, content, settings."""
        ...

    @property
    def samples(self) -> int:
        """How many samples it will report."""
        ...


JobT = TypeVar("JobT", bound=Job)
ResultT = TypeVar("ResultT", bound=BaseModel)


class Journal(Generic[ResultT]):
    """Results of finished jobs, a line each, so that a command that was killed goes on where it was.

    Args:
        path: the file; where it cannot be written, nothing is remembered.
        kind: what a result is.
        holds: whether a result that is remembered still holds.
    """

    def __init__(self, path: Path, kind: type[ResultT], holds: Callable[[ResultT], bool] = lambda result: True) -> None:
        self.path, self.holds = path, holds
        self._done: dict[str, ResultT] = {}
        try:
            for line in path.read_bytes().splitlines():
                self._learn(line, kind)
        except OSError:
            return

    def _learn(self, line: bytes, kind: type[ResultT]) -> None:
        try:
            entry = json.loads(line)
            self._done[entry["key"]] = kind.model_validate(entry["result"])
        except (ValueError, KeyError, TypeError):
            return  # torn by a kill

    def __getitem__(self, job: Job) -> ResultT | None:
        result = self._done.get(job.key)
        return result if result is not None and self.holds(result) else None

    def __setitem__(self, job: Job, result: ResultT) -> None:
        line = json.dumps({"key": job.key, "result": result.model_dump(mode="json")})
        try:
            # The line break comes first, so that a torn line spoils none but itself.
            with self.path.open("a") as file:
                file.write(f"\n{line}" if file.tell() else line)
        except OSError:
            return  # a folder that is read-only can be looked at all the same

    def forget(self) -> None:
        """Delete the file: the command is through."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            return


def spread(
    function: Callable[[JobT, Advance], ResultT],
    jobs: Sequence[JobT],
    description: str,
    workers: int = 1,
    journal: Journal[ResultT] | None = None,
    check: Callable[[ResultT], None] | None = None,
    done: int = 0,
) -> list[ResultT]:
    """Do the jobs, in this process or in several, behind a progress bar that counts samples.

    Args:
        function: a module's own; gets a job and an `advance` to report its samples with.
        jobs: what is to do.
        description: stands before the bar.
        workers: processes; 1: this one.
        journal: jobs that it knows are not done again; it learns the others.
        check: sees each result as it comes, and may stop the rest with an exception.
        done: samples that were done before, of others than `jobs`.

    Returns:
        Results in the order of the jobs, whatever the number of workers.
    """
    results: dict[int, ResultT] = {}

    def keep(number: int, result: ResultT) -> None:
        results[number] = result
        if check is not None:
            check(result)

    for number, job in enumerate(jobs):
        known = journal[job] if journal is not None else None
        if known is not None:
            keep(number, known)
    left = [number for number in range(len(jobs)) if number not in results]
    total = done + sum(job.samples for job in jobs)

    def arrived(number: int, result: ResultT) -> None:
        if journal is not None:
            journal[jobs[number]] = result
        keep(number, result)

    with progress(description, total, total - sum(jobs[number].samples for number in left)) as advance:
        if min(workers, len(left)) < 2:
            for number in left:
                arrived(number, function(jobs[number], advance))
        else:
            _in_processes(function, {number: jobs[number] for number in left}, workers, advance, arrived)
    return [results[number] for number in range(len(jobs))]


def _in_processes(
    function: Callable[[JobT, Advance], ResultT],
    jobs: Mapping[int, JobT],
    workers: int,
    advance: Advance,
    arrived: Callable[[int, ResultT], None],
) -> None:
    context = multiprocessing.get_context("forkserver")  # not forked: torch has threads that a copy must not hold
    context.set_forkserver_preload([function.__module__])
    reports: SimpleQueue[int] = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    begun: Synchronized[int] = context.Value("i", 0)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (reports, begun))
    try:
        numbers: dict[Future[ResultT], int] = {pool.submit(_work, function, job): n for n, job in jobs.items()}
        waiting = set(numbers)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            while not reports.empty():
                advance(reports.get())
            for future in finished:
                arrived(numbers[future], future.result())
        while not reports.empty():
            advance(reports.get())
    except BaseException as fault:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        if isinstance(fault, BrokenProcessPool):
            raise UserError(
                "a worker process was killed, perhaps because memory ran out; run the same command again, with fewer "
                "`--workers`: it goes on where it was"
            ) from None
        raise
    pool.shutdown()


_reports: SimpleQueue[int] | None = None
_number = 0


def _begin(reports: SimpleQueue[int], begun: Synchronized[int]) -> None:
    """In a new worker: it has a number, tells its progress, and ends with its parent even where that was killed."""
    global _reports, _number
    _reports = reports
    with begun.get_lock():
        _number, begun.value = begun.value, begun.value + 1

    end_with_parent()


def worker_number() -> int:
    """Which of the workers this process is, from 0; 0 also where there are none."""
    return _number


def _work(function: Callable[[JobT, Advance], ResultT], job: JobT) -> ResultT:
    def report(count: int, note: str = "", rate: float | None = None, loss: float | None = None) -> None:
        if _reports is not None:
            _reports.put(count)

    return function(job, report)


def usual_workers() -> int:
    """Processes where the user does not say: the cores of this process, at most 4."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def own_part(text: str = "") -> tuple[int, int]:
    """Which share of the shards this process has: part i of n, 1-based.

    Args:
        text: `i/n`; empty: as Slurm says (a job array's task). The ranks of torchrun divide either further.

    Raises:
        UserError: there is no such part, or the numbers of the job array have gaps.
    """
    if text:
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"--part {text}: must be i/n with 1 <= i <= n, such as 2/8")
        place, tasks = int(number) - 1, int(count)
    else:
        task, tasks = (
            int(os.environ.get(name, usual))
            for name, usual in (("SLURM_ARRAY_TASK_ID", "0"), ("SLURM_ARRAY_TASK_COUNT", "1"))
        )
        step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
        place = (task - int(os.environ.get("SLURM_ARRAY_TASK_MIN", str(task)))) // max(step, 1)
        if not 0 <= place < tasks:
            raise UserError(
                f"the job array has gaps ({tasks} tasks, this one is {task}); say which `--part i/n` it has"
            )
    rank, ranks = (int(os.environ.get(name, usual)) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1")))
    return place * ranks + rank + 1, tasks * ranks


def digest_of(value: Any) -> str:
    """What tells apart two values that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def partial_name(path: Path) -> Path:
    """A name of its own for a file that others may write at the same time, until it is whole."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}.partial")


def sweep(folder: Path) -> None:
    """Delete the partial files that killed processes left behind, an hour after their last byte."""
    for old in folder.glob("*.partial"):
        try:
            if time.time() - old.stat().st_mtime > _ABANDONED:
                old.unlink(missing_ok=True)
        except OSError:
            continue  # another process deletes it


def write_shared(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, though other processes may write the same one."""
    partial = partial_name(path)
    partial.write_bytes(content)
    fsync(partial)
    os.replace(partial, path)
