"""Prompt sets drawn by teacher and variants on all ranks, each image once, going on where it was stopped."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ppcl_ds import launch, memory
from ppcl_ds.atomic import atomic_write, sha256
from ppcl_ds.console import progress
from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.layouts import Laid, lay_out
from ppcl_ds.evaluate.painter import Painter, call_options, described, needs_sharding
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.pipeline_files import read_index
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.watch.preemption import noticed, stop_file

_SMALL = 2**20
"""Bytes of a file that is told from another by its content; larger ones by size and time of change."""
_SEEDS = 100
"""Seeds between a prompt and the next, so that more images of each do not change those that are there."""


@dataclass(frozen=True)
class Image:
    """One image to draw.

    Attributes:
        path: where it goes; the name holds all that it depends on.
    """

    model: str
    text: str
    seed: int
    size: int
    path: Path


class Images:
    """All images that prompt sets ask of some models, by name.

    Args:
        models: `teacher` and variants.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, models: Sequence[str], sets: Sequence[Laid]) -> None:
        self.recipe, self.teacher, self.models, self.sets = recipe, teacher, models, sets
        self.options = call_options(recipe, teacher)

    def __iter__(self) -> Iterator[Image]:
        """Model by model, so that each is loaded once."""
        for model in self.models:
            for laid in self.sets:
                for position in range(len(laid.prompts)):
                    for k in range(laid.per_prompt):
                        yield self.of(laid, model, position, k)

    def of(self, laid: Laid, model: str, position: int, k: int) -> Image:
        """Image k of the prompt at a position."""
        text, size = laid.prompts[position].text, self.size(laid)
        seed = self.recipe.seed + _SEEDS * position + k
        depends = [text, seed, size, self._digests[model], self.recipe.teacher.precision, described(self.options)]
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]
        return Image(model, text, seed, size, laid.root / "drawn" / model / f"{key}.png")

    def size(self, laid: Laid) -> int:
        return laid.settings.size or self.recipe.data.images.size

    def facts(self, laid: Laid, model: str) -> dict[str, Any]:
        """How a model's images of a set are drawn, without which their scores do not compare."""
        scheduler = self.teacher.call.pipe.scheduler
        size = self.size(laid)
        return {
            "set": laid.settings.name,
            "layout": laid.settings.layout,
            "prompts": {
                "file": str(laid.settings.prompts),
                "count": len(laid.prompts),
                "sha256": _content(laid.settings.prompts),
            },
            "model": model,
            "weights": self._digests[model],
            "pipeline": type(self.teacher.call.pipe).__name__,
            "images per prompt": laid.per_prompt,
            "size": [size, size],
            "steps": self.recipe.evaluate.steps,
            "guidance": self.recipe.evaluate.guidance,
            "negative prompt": self.options.get("negative_prompt"),
            "prompt rewriter": None,
            "options": described(self.options),
            "seeds": f"{self.recipe.seed} + {_SEEDS} n + k for image k of prompt n, both from 0; CPU generator",
            "scheduler": {"class": type(scheduler).__name__, **described(scheduler.config)},
            "precision": self.recipe.teacher.precision,
            "versions": {name: version(name) for name in ("ppcl-ds", "torch", "diffusers", "transformers")},
        }

    @cached_property
    def _digests(self) -> dict[str, str]:
        """Model -> all files of it and of the pipeline around it."""
        component = self.recipe.teacher.component
        around = [
            path
            for name, value in read_index(self.teacher.path).items()
            if isinstance(value, list) and name != component
            for path in sorted((self.teacher.path / name).rglob("*"))
        ]
        folders = {
            name: self.teacher.files.folder if name == "teacher" else self.recipe.pruned(name) for name in self.models
        }
        return {name: _digest([*sorted(folder.glob("*")), *around]) for name, folder in folders.items()}


def _digest(files: Sequence[Path]) -> str:
    """A number for what files hold."""
    found = hashlib.sha256()
    for file in filter(Path.is_file, files):
        about = file.stat()
        known = sha256(file) if about.st_size < _SMALL else f"{about.st_size} {about.st_mtime_ns}"
        found.update(f"{file.parent.name}/{file.name} {known}\n".encode())
    return found.hexdigest()


def _content(path: Path) -> str:
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in filter(Path.is_file, files):
        found.update(file.read_bytes())
    return found.hexdigest()


class _Counted:
    """Numbers that all ranks count up, in the rendezvous store; a process that is alone counts by itself."""

    def __init__(self) -> None:
        self.alone: dict[str, int] = {}
        self.store: dist.Store | None = None
        if dist.is_initialized():
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store may outlive the ranks
            port = int(os.environ["MASTER_PORT"])
            self.store = dist.PrefixStore(
                f"drawing/{start}", dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False)
            )

    def add(self, name: str, count: int) -> int:
        """The number after it was raised."""
        if self.store is not None:
            return int(self.store.add(name, count))
        self.alone[name] = self.alone.get(name, 0) + count
        return self.alone[name]


def stopped_file(run: Path) -> Path:
    """Says what has ended drawing early, for the job's script, as trainings have it."""
    return run / "evaluate" / "stopped"


@memory.phase("prompt sets")
def draw_sets(images: Images) -> bool:
    """Draw what is missing and lay everything out; every rank must call this, and has left the others afterwards.

    Returns:
        Whether all is drawn; SIGUSR1 (Slurm's notice) or RUN/STOP ends it early, and the next start goes on.

    Raises:
        UserError: something cannot be drawn or written; what is drawn stays.
    """
    device = launch.join() if launch.is_rank() else launch.device()
    every = list(images)
    missing = [number for number, image in enumerate(every) if not image.path.exists()]
    if dist.is_initialized():
        missing = launch.all_gather(missing)[0]  # before anybody draws: the same list for all
    todo = [every[number] for number in missing]
    complete = True
    if launch.is_first_rank():
        stopped_file(images.recipe.run).unlink(missing_ok=True)
    if todo:
        sharded = needs_sharding(images.recipe, images.teacher, device)
        if sharded and not dist.is_initialized():
            raise UserError("evaluate.sharded: a model is spread over processes; start them with torchrun, or by Slurm")
        painter = Painter(images.recipe, images.teacher, device, sharded)
        complete = _draw(painter, todo, len(every))
    if launch.is_first_rank() and complete:
        _lay_out(images)
    if dist.is_initialized():
        launch.leave()
    return complete


def _draw(painter: Painter, todo: Sequence[Image], total: int) -> bool:
    """Draw this rank's share; whether that was all."""
    counted = _Counted()
    seen = 0
    why = ""
    with progress("draw", total, total - len(todo)) as advance:

        def show(done: int) -> None:
            nonlocal seen
            advance(done - seen, note=f"{dist.get_world_size()} processes" if dist.is_initialized() else "")
            seen = done

        turns = _together(todo) if painter.sharded else _in_turn(todo, counted)
        for image, counts in turns:
            if why := _stops(painter, counted):
                break
            painter.load(image.model)
            drawn = painter.draw(image.text, image.seed, image.size)
            if counts:
                buffer = io.BytesIO()
                drawn.save(buffer, "PNG")
                _write(image.path, buffer.getvalue())
                show(counted.add("done", 1))
        while launch.is_first_rank() and seen < len(todo):  # who has failed ends all
            time.sleep(0.2)
            show(counted.add("done", 0))
            if counted.add("stops", 0):  # this rank or another has been told
                break
    if not launch.is_first_rank() or seen == len(todo):
        return not why
    atomic_write(stopped_file(painter.recipe.run), (why or "signal") + "\n")
    print("stops; what is drawn stays, and the next start goes on", flush=True)
    return False


def _stops(painter: Painter, counted: _Counted) -> str:
    """Why drawing ends before this image, the same on every rank where they draw together; empty: it does not."""
    told = int(noticed())
    asked = int(stop_file(painter.recipe.run).exists())
    if painter.sharded:
        told, asked = (max(each) for each in zip(*launch.all_gather((told, asked)), strict=True))
    stops = counted.add("stops", told or asked)
    if painter.sharded and not told | asked:
        return ""  # where another rank is ahead in counting
    return "" if not stops else "STOP" if asked else "signal"


def _in_turn(todo: Sequence[Image], counted: _Counted) -> Iterator[tuple[Image, bool]]:
    """Every image on the rank that is free first."""
    while (number := counted.add("taken", 1) - 1) < len(todo):
        yield todo[number], True


def _together(todo: Sequence[Image]) -> Iterator[tuple[Image, bool]]:
    """All ranks at a time, of one model: a rank that has no image left draws one that does not count."""
    rank, world = dist.get_rank(), dist.get_world_size()
    by_model: dict[str, list[Image]] = {}
    for image in todo:
        by_model.setdefault(image.model, []).append(image)
    for own in by_model.values():
        for first in range(0, len(own), world):
            number = first + rank
            yield own[min(number, len(own) - 1)], number < len(own)


def _write(path: Path, content: bytes) -> None:
    try:
        atomic_write(path, content)
    except OSError as fault:
        path.with_name(f"{path.name}.partial").unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({fault.strerror}); what is drawn stays, start again") from None


def _lay_out(images: Images) -> None:
    for laid in images.sets:
        for model in images.models:

            def drawn(position: int, k: int, laid: Laid = laid, model: str = model) -> Path:
                return images.of(laid, model, position, k).path

            facts = images.facts(laid, model)
            try:
                lay_out(laid, model, drawn, facts)
            except OSError as fault:
                name = fault.filename or laid.root
                raise UserError(f"{name} cannot be written ({fault.strerror}); what is drawn stays") from None


def paths(images: Images, laid: Laid) -> Mapping[str, list[list[Path]]]:
    """Model -> for every prompt, where its images are."""
    return {
        model: [[images.of(laid, model, n, k).path for k in range(laid.per_prompt)] for n in range(len(laid.prompts))]
        for model in images.models
    }
