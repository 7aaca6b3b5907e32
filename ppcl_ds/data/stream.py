"""From shards to micro-batches: which shards there are, and the one order in which every run reads their samples.

Shapes: C latent channels, H and W latent height and width, S text tokens, E embedding channels, P pooled channels.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import webdataset as wds
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from ppcl_ds.data.batch import Batch, Prompts
from ppcl_ds.errors import UserError
from ppcl_ds.whole import write_whole

Sample = dict[str, Any]
"""One sample as webdataset gives it: `__key__`, and the bytes of each member by its suffix."""


class ShardEntry(BaseModel):
    """One shard of a folder."""

    name: str
    samples: int
    size: int
    """Length of the file in bytes."""
    sha256: str
    raw_sha256: str = ""
    """Of an encoded shard: the sha256 of the raw shard that it was made from."""

    def is_in(self, folder: Path) -> bool:
        """Whether the shard lies in `folder`, at its full length.

        The length matters: a tar that was cut between two samples reads as a shorter, whole one.
        """
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.size


class Index(BaseModel):
    """The `index.json` of a folder of shards; it is written last, so a folder that has one is whole."""

    shards: list[ShardEntry]
    settings: dict[str, Any] = {}
    """The recipe values that the shards were made with; where they differ now, the shards are made again."""

    @staticmethod
    def read(path: Path, command: str) -> Index:
        """Read an index file.

        Args:
            path: the `index.json`.
            command: what writes it, for the message.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            return Index.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path} is missing; run `{command} RECIPE` first") from None
        except ValidationError:
            raise UserError(f"{path} is damaged; delete {path.parent} and run `{command} RECIPE`") from None

    def write(self, path: Path) -> None:
        """Write an index file, whole or not at all."""
        write_whole(path, self.model_dump_json(indent=1) + "\n")


def split_shards(folder: Path, split: Literal["train", "heldout"]) -> list[Path]:
    """The encoded shards of one split, in the order of their index; see `split_entries`."""
    return [folder / "encoded" / entry.name for entry in split_entries(folder, split)]


def split_entries(folder: Path, split: Literal["train", "heldout"]) -> list[ShardEntry]:
    """What the index says of the encoded shards of one split.

    Args:
        folder: the recipe's `data.shards`.
        split: which samples.

    Raises:
        UserError: nothing is encoded yet, a listed shard is missing or cut short, or the split is empty.
    """
    index = Index.read(folder / "encoded" / "index.json", "ppcl-data encode")
    entries = [entry for entry in index.shards if entry.name.startswith(f"{split}-")]
    if not entries:
        raise UserError(f"{folder}: no {split} samples; set `data.heldout` and run `ppcl-data shard` and `encode`")
    for entry in entries:
        if not entry.is_in(folder / "encoded"):
            raise UserError(f"{folder / 'encoded' / entry.name} is missing or cut short; run `ppcl-data encode RECIPE`")
    return entries


def empty_prompt(folder: Path, masked: bool) -> Prompts:
    """The encoded empty caption, B = 1.

    Args:
        folder: the recipe's `data.shards`.
        masked: whether the family reads a text mask (recipe: `data.captions.max_tokens` is 0).

    Raises:
        UserError: it is not there, or it is damaged.
    """
    path = folder / "encoded" / "empty.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing; run `ppcl-data encode RECIPE` first")
    return _prompt(_tensors(path.read_bytes(), str(path), "prompt_embeds"), masked)


def read_samples(shard: Path) -> Iterator[Sample]:
    """The samples of one shard, in stored order, undecoded.

    Raises:
        UserError: the file is missing or is not a whole tar.
    """
    # Built from bare stages: `wds.WebDataset` would divide the shards by the rank it finds in the environment.
    shard_list = wds.SimpleShardList([str(shard.absolute())])
    try:
        yield from wds.DataPipeline(shard_list, wds.tarfile_to_samples())
    except (OSError, EOFError, ValueError, tarfile.TarError) as fault:
        # webdataset adds its stream and address to the arguments of whatever passes through.
        why = fault.strerror if isinstance(fault, OSError) else str(fault.args[0]).split(" @ ")[0]
        raise UserError(f"{shard}: not a whole tar ({why}); delete it and make it again with `ppcl-data`") from fault


def digest(entries: Sequence[ShardEntry]) -> str:
    """What tells apart two lists of shards: other shards, or other contents, give other samples in another order."""
    return hashlib.sha256("".join(entry.sha256 for entry in entries).encode()).hexdigest()


class MicroBatchStream:
    """Micro-batches number 0, 1, 2, ... without end, in one order for the whole run.

    Micro-batch j holds samples [j * micro_batch, (j + 1) * micro_batch) of epoch 0, epoch 1, ... laid end to end. An
    epoch has every sample once, shards shuffled, then samples shuffled within a window; its order depends on
    (seed, epoch, samples in each shard) alone. So any number of ranks sees the same micro-batches.

    Args:
        shards: encoded shards; every rank gives the same list.
        micro_batch: samples in a micro-batch.
        seed: of the order.
        masked: whether the family reads a text mask (recipe: `data.captions.max_tokens` is 0).
        shuffle: False keeps the stored order in every epoch.
        window: samples held in memory, still encoded, to draw the next one from.
        samples: in all shards together; 0: not known. Where it is, epochs before the first micro-batch are not read.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        micro_batch: int,
        seed: int,
        *,
        masked: bool,
        shuffle: bool = True,
        window: int = 2048,
        samples: int = 0,
    ) -> None:
        self.shards = list(shards)
        self.micro_batch = micro_batch
        self.seed = seed
        self.masked = masked
        self.shuffle = shuffle
        self.window = window
        self.samples = samples

    def take(self, start: int, stride: int) -> Iterator[tuple[int, Batch]]:
        """Yield micro-batches number start, start + stride, start + 2 * stride, ... and their numbers, for ever.

        Rank r of W calls `take(r, W)`. Samples of other micro-batches are read past, not decoded.

        Yields:
            The number, and the micro-batch: float32 on the CPU.

        Raises:
            UserError: a tar is broken or a sample lacks a member; the message names shard and key.
        """
        mine: list[tuple[Path, Sample]] = []
        epoch = start * self.micro_batch // self.samples if self.samples else 0
        for position, sample in enumerate(self._endless(epoch), epoch * self.samples):
            number = position // self.micro_batch
            if number < start or (number - start) % stride:
                continue
            mine.append(sample)
            if len(mine) == self.micro_batch:
                yield number, self._decode(mine)
                mine = []

    def _endless(self, first: int) -> Iterator[tuple[Path, Sample]]:
        for epoch in itertools.count(first):
            samples = 0
            for sample in self._epoch(epoch):
                samples += 1
                yield sample
            if samples == 0:
                raise UserError(f"no samples in {', '.join(map(str, self.shards))}; run `ppcl-data encode RECIPE`")

    def _epoch(self, epoch: int) -> Iterator[tuple[Path, Sample]]:
        """Every sample once."""
        if not self.shuffle:
            return _samples_of(self.shards)
        rng = random.Random(f"{self.seed}:{epoch}")
        shards = list(self.shards)
        rng.shuffle(shards)
        return _shuffled(_samples_of(shards), self.window, rng)

    def _decode(self, samples: Sequence[tuple[Path, Sample]]) -> Batch:
        latents, prompts = [], []
        for shard, sample in samples:
            name = f"{shard}:{sample['__key__']}"
            for member in ("txt", "safetensors"):
                if member not in sample:
                    raise UserError(f"{name}: no .{member} member; delete the shard and make it again")
            tensors = _tensors(sample["safetensors"], name, "latents", "prompt_embeds")
            latents.append(tensors["latents"].float())
            prompts.append(_prompt(tensors, self.masked))
        keys = tuple(sample["__key__"] for _, sample in samples)
        return Batch(torch.stack(latents), Prompts.stack(prompts), keys)


def _samples_of(shards: Iterable[Path]) -> Iterator[tuple[Path, Sample]]:
    return ((shard, sample) for shard in shards for sample in read_samples(shard))


def _shuffled(samples: Iterable[tuple[Path, Sample]], window: int, rng: random.Random) -> Iterator[tuple[Path, Sample]]:
    """Each time one of the `window` samples at hand, by chance.

    Not `wds.shuffle`: the order is part of what a run can be resumed from, so it must not change with a library.
    """
    held: list[tuple[Path, Sample]] = []
    for sample in samples:
        held.append(sample)
        if len(held) >= window:
            chosen = rng.randrange(len(held))
            held[chosen], held[-1] = held[-1], held[chosen]
            yield held.pop()
    rng.shuffle(held)
    yield from held


def _tensors(data: bytes, name: str, *required: str) -> dict[str, Tensor]:
    """Tensors of a safetensors member or file; `name` is what messages call it."""
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as fault:
        raise UserError(f"{name}: not a safetensors file ({fault}); write it again with `ppcl-data encode`") from None
    for tensor in required:
        if tensor not in tensors:
            raise UserError(f"{name}: no tensor `{tensor}`; write it again with `ppcl-data encode`")
    return tensors


def _prompt(tensors: dict[str, Tensor], masked: bool) -> Prompts:
    """`prompt_embeds` (S, E) and, if any, `pooled` (P,) as one prompt, B = 1."""
    embeds = tensors["prompt_embeds"].float()[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if masked else None
    pooled = tensors["pooled"].float()[None] if "pooled" in tensors else None
    return Prompts(embeds, mask, pooled)
