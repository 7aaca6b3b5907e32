"""What every command does at a terminal: one line for a user's fault, one progress display for a person or a log."""

from __future__ import annotations

import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ppcl_ds import launch, launcher, memory, reporting
from ppcl_ds.errors import UserError, brief

Item = TypeVar("Item")


class Advance(Protocol):
    """Says that `count` more are done; a note that is not empty replaces the one shown.

    `rate`: samples a second, where somebody has measured it; `loss`: the newest, of a training.
    """

    def __call__(self, count: int, note: str = "", rate: float | None = None, loss: float | None = None) -> None:
        """Advance."""


LOG_SECONDS = 10.0
"""Least time between two progress lines where there is no terminal, and between two writings of the progress file."""


CHATTY = (
    *("torchao", "torch.utils._pytree", "bitsandbytes", "diffusers.quantizers.torchao.torchao_quantizer"),
    *("diffusers.configuration_utils", "transformers.utils.import_utils"),
)
"""Loggers that complain, whenever diffusers is imported, that optional kernels of quantising packages do not load; and
whenever a model is made, of keys of its configuration that its class has no use for."""


def run(app: typer.Typer) -> None:
    """Run a command line: a `UserError` is one line on stderr and exit code 2, Ctrl-C is 130 and SIGTERM 143."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # models that are made empty
    memory.set_allocator()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, launch.leave_by_signal)
    sys.unraisablehook = launch.lost
    if launch.is_rank():
        launch.end_with_launcher()
    reporting.keep_in(reporting.of_job()).update()  # what an earlier start left is over
    try:
        app()
    except UserError as fault:
        launcher.say_once(f"error: {fault}")
        reporting.own.fail(f"error: {fault}")
        code = 2
    except SystemExit as way_out:
        code = int(way_out.code or 0)
        if code and reporting.own.report.total and reporting.own.report.state == "running":
            reporting.own.update(state="stopped", seconds_left=None)
    except Exception as fault:
        reporting.own.fail(f"{type(fault).__name__}: {brief(fault)}")
        if not launch.has_joined():
            raise
        _let_the_first_speak()
        sys.excepthook(*sys.exc_info())
        code = 1
    else:
        code = 0
        if reporting.own.report.state == "running":
            reporting.own.update(state="done", seconds_left=None)
    if launch.has_joined():
        launch.end(code)
    sys.exit(code)


def _let_the_first_speak() -> None:
    """In a rank that fails: wait for as long as the launcher takes to end it, if it fails for another that has ended.

    Its own connections stay open meanwhile, so that no other rank fails for this one before it has spoken.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(2 * launcher.GRACE)


def track(items: Iterable[Item], description: str, total: int, done: int = 0) -> Iterator[Item]:
    """Yield `items` and show how many of `total` have passed; `done` of them passed before this run."""
    with progress(description, total, done) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show progress while the block runs: a bar on a terminal, else a plain line every `LOG_SECONDS` and at the end.

    Yields:
        `advance(n, note)`: says that n more of `total` are done; a note that is not empty replaces the one shown.
    """
    if not launch.is_first_rank():  # of the processes of one launch, the first one speaks
        yield lambda count, note="", rate=None, loss=None: None
        return
    counter = _Counter(description, total, done)
    try:
        if sys.stdout.isatty():
            with _bar(counter):
                yield counter.advance
        else:
            yield counter.advance
            print(counter.line, flush=True)
    except (KeyboardInterrupt, SystemExit):
        counter.write("stopped")
        raise
    counter.write("done" if counter.done >= total else "stopped")


@contextmanager
def _bar(counter: _Counter) -> Iterator[None]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, TextColumn("{task.fields[note]}")) as bar:
        task = bar.add_task(counter.description, total=counter.total, completed=counter.done, note="")
        counter.show = lambda: bar.update(task, completed=counter.done, note=counter.note)
        yield


class _Counter:
    """What has been done, as a plain line for logs and in the progress file.

    Attributes:
        show: called whenever it moves; None: a line is printed every `LOG_SECONDS`.
    """

    def __init__(self, description: str, total: int, done: int) -> None:
        self.description, self.total, self.before, self.done = description, total, done, done
        self.began = self.written = time.monotonic()
        self.note = ""
        self.rate: float | None = None
        self.loss: float | None = None
        self.show: Callable[[], object] | None = None
        self.write("running")

    def advance(self, count: int, note: str = "", rate: float | None = None, loss: float | None = None) -> None:
        self.done += count
        self.note, self.rate = note or self.note, rate or self.rate
        self.loss = self.loss if loss is None else loss
        if self.show:
            self.show()
        if time.monotonic() - self.written >= LOG_SECONDS and self.done < self.total:
            self.written = time.monotonic()
            self.write("running")
            if not self.show:
                print(self.line, flush=True)

    @property
    def seconds_left(self) -> float | None:
        if not self.before < self.done < self.total:
            return None
        return (time.monotonic() - self.began) / (self.done - self.before) * (self.total - self.done)

    @property
    def line(self) -> str:
        line = f"{self.description}: {self.done} of {self.total}, {_clock(time.monotonic() - self.began)} elapsed"
        if self.seconds_left is not None:
            line += f", {_clock(self.seconds_left)} remaining"
        return f"{line}; {self.note}" if self.note else line

    def write(self, state: reporting.State) -> None:
        reporting.own.update(
            state=state,
            what=self.description,
            step=self.done,
            total=self.total,
            loss=self.loss,
            samples_per_second=self.rate,
            seconds_left=self.seconds_left,
        )


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
