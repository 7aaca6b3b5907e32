"""What every command does at a terminal: one line for a user's fault, one progress display for a person or a log."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ppcl_ds import launch
from ppcl_ds.errors import UserError

Item = TypeVar("Item")


class Advance(Protocol):
    """Says that `count` more are done; a note that is not empty replaces the one shown."""

    def __call__(self, count: int, note: str = "") -> None:
        """Advance."""


LOG_SECONDS = 10.0
"""Least time between two progress lines where there is no terminal."""


_CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers that complain, whenever diffusers is imported, that optional kernels of quantising packages do not load."""


def run(app: typer.Typer) -> None:
    """Run a command line: a `UserError` is one line on stderr and exit code 2; SIGTERM unwinds like Ctrl-C."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        code = 2
    except SystemExit as way_out:
        code = int(way_out.code or 0)
    except Exception:
        if not launch.has_joined():
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    else:
        code = 0
    if launch.has_joined():
        launch.end(code)
    sys.exit(code)


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
    if int(os.environ.get("RANK", "0")):  # of the processes of one launch, the first one speaks
        yield lambda count, note="": None
        return
    if not sys.stdout.isatty():
        lines = _Lines(description, total, done)
        yield lines.advance
        lines.show()
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, TextColumn("{task.fields[note]}")) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")

        def advance(count: int, note: str = "") -> None:
            bar.advance(task, count)
            if note:
                bar.update(task, note=note)

        yield advance


class _Lines:
    """Progress as plain lines, for logs."""

    def __init__(self, description: str, total: int, done: int) -> None:
        self.description, self.total, self.before, self.done = description, total, done, done
        self.began = self.shown = time.monotonic()
        self.note = ""

    def advance(self, count: int, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        if time.monotonic() - self.shown >= LOG_SECONDS and self.done < self.total:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        elapsed = self.shown - self.began
        line = f"{self.description}: {self.done} of {self.total}, {timedelta(seconds=int(elapsed))} elapsed"
        if self.before < self.done < self.total:
            remaining = elapsed / (self.done - self.before) * (self.total - self.done)
            line += f", {timedelta(seconds=int(remaining))} remaining"
        print(f"{line}; {self.note}" if self.note else line, flush=True)
