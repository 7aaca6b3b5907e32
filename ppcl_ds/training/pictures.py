"""What trajectories end in: finished images as encoded shards, for another training, and a few for TensorBoard."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import webdataset as wds
from torch import Tensor

from ppcl_ds.data.index import Index, describe, scan
from ppcl_ds.data.stored import Stored
from ppcl_ds.data.stream import TEXTS
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.encoding import Decoder
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.trajectories import Finished, TrajectoryStream

_SHOWN = 8


class Pictures:
    """The finished images of a run; every rank makes one and makes every call.

    They lie in `RUN/pictures/encoded`, as `ppcl-data encode` would have written them. A file holds what a rank has
    finished since the checkpoint before; what was written after the one that a run goes on from is made again.
    """

    def __init__(self, recipe: Recipe, call: PipelineCall) -> None:
        self.recipe, self.call = recipe, call
        self.folder = recipe.run / "pictures" / "encoded"

    def go_on(self, step: int, data: TrajectoryStream) -> None:
        """Forget what was finished after a step, and keep nothing twice that was finished before."""
        if dist.get_rank() == 0:
            for path in self.folder.glob("train-*.tar"):
                if int(path.name.split("-")[1]) > step:
                    path.unlink()
        dist.barrier()
        for path in self.folder.glob("train-*.tar"):
            with path.open("rb") as file:
                data.known |= {member.key for member in scan(file)[0]}

    def keep(self, step: int, data: TrajectoryStream) -> dict[str, Tensor]:
        """Write what was finished by a step; on rank 0, some of it as images (N, C, H, W) in [-1, 1]."""
        finished, data.finished = data.finished, []
        if finished:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(self.folder / f"train-{step:06d}-{dist.get_rank():05d}.tar", finished)
        dist.barrier()
        if dist.get_rank() or not self.folder.exists():
            return {}
        shutil.copyfile(self.recipe.data.shards / "encoded" / TEXTS, self.folder / TEXTS)
        self._index()
        return {"trajectories": self._decoded(finished)} if finished else {}

    def _write(self, path: Path, finished: list[Finished]) -> None:
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as writer:
            for each in finished:
                [latents] = self.call.to_vae(each.sample.size)(each.latents)
                stored = Stored(latents, each.sample.size, {"": each.sample.prompt}).write()
                parts = {"txt": each.sample.caption.encode(), "safetensors": stored}
                writer.write({"__key__": each.key, **parts})
        os.replace(partial, path)

    def _index(self) -> None:
        entries = []
        for path in sorted(self.folder.glob("train-*.tar")):
            with path.open("rb") as file:
                members, _ = scan(file)
            shapes: dict[str, list[int]] = {}
            for number, member in enumerate(members):
                shapes.setdefault(member.key.rpartition("-")[2], []).append(number)
            entries.append(describe(path, members, shapes=shapes))
        Index(shards=entries).write(self.folder / "index.json")

    def _decoded(self, finished: list[Finished]) -> Tensor:
        """Those of the first one's size."""
        size = finished[0].sample.size
        alike = [each.latents for each in finished if each.sample.size == size][:_SHOWN]
        images = Decoder(self.recipe.teacher.folder)(self.call.to_vae(size)(torch.cat(alike)))
        return images[:, :, images.shape[2] // 2] if images.dim() == 5 else images
