"""The checkpoint: safetensors files that every rank wrote its share of, read on any number of ranks.

    step-000200/
      checkpoint.json             the step, and for each unit its parameters in order, and which file holds which part
                                  of its flat vector
      rank-00000.safetensors ...  per unit of the rank's stage: `UNIT/master`, `UNIT/exp_avg`, `UNIT/exp_avg_sq` (that
                                  part, float32), `UNIT/step` (); the rank's random state; and, of trajectories,
                              `pool/LANE/SHAPE/latents` and `places`, what its images in the making were

A unit's flat vector is its parameters laid end to end, so a part of it is the same thing on any topology. Where a whole
variant is fine-tuned, its blocks stand in the units' place, and `BLOCK/ema` is the moving average of a block's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ppcl_ds.errors import UserError, brief
from ppcl_ds.teacher.files import Source
from ppcl_ds.units.plan import Plan, UnitPlan

POOL = "pool/"
"""Before the names of what samples are made from."""


class Piece(BaseModel):
    """Elements `start:stop` of a unit's flat vector, and the file that holds them."""

    file: str
    start: int
    stop: int


class SavedUnit(BaseModel):
    """One unit of a checkpoint."""

    parameters: dict[str, list[int]]
    """Name inside the unit -> shape, in the order of the flat vector. A depth unit's names are its block class's."""
    pieces: list[Piece]
    skipped: int
    """Steps that the unit has skipped because its gradient was not finite."""


class Contents(BaseModel):
    """`checkpoint.json`."""

    step: int
    units: dict[str, SavedUnit]


class Checkpoint:
    """A whole checkpoint on disk, opened for reading by one process.

    Raises:
        UserError: its `checkpoint.json` is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.contents = Contents.model_validate_json((folder / "checkpoint.json").read_bytes())
        except (OSError, ValidationError) as fault:
            why = brief(fault)
            raise UserError(
                f"checkpoint {folder}: checkpoint.json cannot be read ({why}); write the name of another one into "
                f"{folder.parent / 'latest'}"
            ) from None

    def unit(self, name: str, what: str = "master") -> dict[str, Tensor]:
        """A trained unit's float32 masters, or whatever else is kept of each element: name inside the unit -> tensor.

        Raises:
            UserError: the unit is not in the checkpoint, or its file cannot be read.
        """
        if name not in self.contents.units:
            raise UserError(f"checkpoint {self.folder} has no unit '{name}'")
        shapes = {key: torch.Size(shape) for key, shape in self.contents.units[name].parameters.items()}
        sizes = [shape.numel() for shape in shapes.values()]
        flat = self.part(name, what, 0, sum(sizes))
        return {key: part.view(shapes[key]) for key, part in zip(shapes, flat.split(sizes), strict=True)}

    def part(self, name: str, what: str, start: int, stop: int) -> Tensor:
        """Elements `start:stop` of a unit's master or moment, float32, from whichever files hold them."""
        found = [torch.empty(0)]
        for piece in self.contents.units[name].pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                values = self.read(piece.file, f"{name}/{what}", first - piece.start, last - piece.start)
                assert values is not None
                found.append(values)
        return torch.cat(found)

    def steps_of(self, name: str) -> Tensor | None:
        """How many steps a unit's moments have seen, (); None before the first."""
        return self.read(self.contents.units[name].pieces[0].file, f"{name}/step")

    def moments_of(self, name: str) -> list[str]:
        """What the optimizer keeps of each element beside the master: `exp_avg` and so on."""
        file = self.contents.units[name].pieces[0].file
        with self._open(file) as opened:
            own = [key.removeprefix(f"{name}/") for key in opened.keys() if key.startswith(f"{name}/")]  # noqa: SIM118
        return [what for what in own if what not in ("master", "step")]

    def found(self, prefix: str) -> dict[str, Tensor]:
        """Everything whose name begins so, in any rank's file: the rest of the name -> tensor.

        Raises:
            UserError: a file cannot be read.
        """
        tensors: dict[str, Tensor] = {}
        for file in sorted(self.folder.glob("rank-*.safetensors")):
            with self._open(file.name) as opened:
                own = [key for key in opened.keys() if key.startswith(prefix)]  # noqa: SIM118
                tensors |= {key.removeprefix(prefix): opened.get_tensor(key) for key in own}
        return tensors

    def read(self, file: str, key: str, start: int | None = None, stop: int | None = None) -> Tensor | None:
        """A tensor of one file, or a range of it; None where the file has none of that name.

        Raises:
            UserError: the file cannot be read.
        """
        with self._open(file) as opened:
            if key not in opened.keys():  # noqa: SIM118 - it is no mapping
                return None
            return opened.get_tensor(key) if start is None else opened.get_slice(key)[start:stop]

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                yield opened
        except (OSError, SafetensorError) as fault:
            raise UserError(f"checkpoint {self.folder}: {file} cannot be read ({fault})") from None


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The newest whole checkpoint of a run.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return Checkpoint(folder / (folder / "latest").read_text().strip())
    except OSError:
        raise UserError(f"no checkpoint in {folder}; run `ppcl distill` first") from None


def unit_sources(checkpoint: Checkpoint, trained: Plan, unit: UnitPlan) -> dict[str, Source]:
    """A trained unit's float32 masters by their name inside the unit, each read when it is asked for.

    Args:
        trained: the plan that the checkpoint was trained with.

    Raises:
        UserError: the unit was not trained in that run.
    """
    if unit not in trained.units or unit.name not in checkpoint.contents.units:
        where = checkpoint.folder.parent.parent
        raise UserError(f"unit '{unit.name}' on blocks {list(unit.span)} was not trained in {where}")
    return sources_of(checkpoint, unit.name)


def sources_of(checkpoint: Checkpoint, name: str) -> dict[str, Source]:
    """Everything that was trained under a name, each tensor float32 and read when it is asked for.

    Where there is a moving average of the weights, it is that.
    """
    what = "ema" if "ema" in checkpoint.moments_of(name) else "master"
    sources: dict[str, Source] = {}
    start = 0
    for key, dimensions in checkpoint.contents.units[name].parameters.items():
        shape = torch.Size(dimensions)
        sources[key] = Source(shape, torch.float32, partial(_read, checkpoint, name, what, start, shape))
        start += shape.numel()
    return sources


def _read(checkpoint: Checkpoint, name: str, what: str, start: int, shape: torch.Size) -> Tensor:
    return checkpoint.part(name, what, start, start + shape.numel()).view(shape)
