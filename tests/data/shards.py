"""Small encoded shards whose samples say which they are."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset as wds

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.index import Index, describe, scan
from ppcl_ds.data.stored import Stored
from ppcl_ds.data.stream import MicroBatchStream
from ppcl_ds.sections import Data

Read = dict[int, tuple[str, ...]]
"""Keys of micro-batches by their numbers."""


def section(folder: Path, **changes: Any) -> Data:
    """The recipe section for shards below `folder`; everything happens in the test's own process."""
    usual = {"source": "images", "shards": folder, "images": {"size": 2}, "workers": 0}
    return Data.model_validate(usual | changes)


def prompt(number: int) -> Prompt:
    """What `encode_prompt` might return: n % 3 + 1 tokens (1, S, 2) and a pooled embedding (1, 3), both full of n."""
    value = float(number)
    return Prompt(((torch.full((1, number % 3 + 1, 2), value), None, torch.full((1, 3), value)),))


def members(number: int, height: int = 2) -> dict[str, Any]:
    """Sample number n: key `kn`, caption `n`, latents (1, height, 2) full of n, and `prompt(n)`."""
    stored = Stored(torch.full((1, height, 2), float(number)), Size(height, 2), {"": prompt(number)})
    return {"__key__": f"k{number}", "txt": str(number).encode(), "safetensors": stored.write()}


def write_shards(folder: Path, counts: Sequence[int], tall: Sequence[int] = (), split: str = "train") -> list[Path]:
    """Encoded shards of so many samples each, with their index; latents are 2 high, those in `tall` 4."""
    encoded = folder / "encoded"
    encoded.mkdir(exist_ok=True)
    entries, number = [], 0
    for shard, count in enumerate(counts):
        path = encoded / f"{split}-{shard:06d}.tar"
        shapes: dict[str, list[int]] = {}
        with path.open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as writer:
            for own in range(count):
                height = 4 if number in tall else 2
                writer.write(members(number, height))
                shapes.setdefault(f"1x{height}x2", []).append(own)
                number += 1
        with path.open("rb") as written:
            found, problems = scan(written)
        assert not problems
        entries.append(describe(path, found, shapes=shapes))
    Index(shards=entries).write(encoded / "index.json")
    return [encoded / entry.name for entry in entries]


def rewrite(path: Path, change: Callable[[str, bytes], tuple[str, bytes]]) -> None:
    """Write a shard's members again as `change(name, data) -> (name, data)` says; sizes stay as the index has them."""
    content = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            member.name, data = change(member.name, file.read())
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    assert len(content.getvalue()) == path.stat().st_size
    path.write_bytes(content.getvalue())


def open_stream(data: Data, micro_batch: int = 1, lanes: int = 1) -> MicroBatchStream:
    """The training stream of shards below `data.shards`."""
    return MicroBatchStream(data, "train", micro_batch, 7, data.shards / "bad.log", lanes)


def read(stream: MicroBatchStream, count: int, start: int = 0, stride: int = 1) -> Read:
    """Keys of `count` micro-batches by their numbers."""
    taken = islice(stream.take(start, stride), count)
    return {number: tuple(sample.key for sample in batch.samples) for number, batch in taken}
