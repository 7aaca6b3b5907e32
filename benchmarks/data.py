"""The data road: our loader against bare webdataset and raw tar reading, `shard` against a plain ShardWriter loop.

    python -m benchmarks.data [--json FILE] [--quick]

Everything is read from the page cache, so what is measured is the work of the programs, not of a disk.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.load import MIB, memory_now
from benchmarks.table import JsonFile, Quick, Row, row, row_of_pairs, show
from data_tools.shard import shard
from ppcl_ds.data.batch import Batch, Prompt, Sample, Size
from ppcl_ds.data.index import Index, describe, scan
from ppcl_ds.data.stored import Stored
from ppcl_ds.data.stream import MicroBatchStream, decode
from ppcl_ds.sections import Data

MICRO_BATCH = 8
LATENTS, TOKENS, WIDTH = (16, 64, 64), 64, 512
"""A picture of 512 x 512, and its caption: 192 KiB a sample."""


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *reading(Path(folder) / "reading", shards=4, samples=100 if quick else 250, pairs=3 if quick else 7),
            *resuming(Path(folder) / "resuming", shards=100 if quick else 1000, pairs=3),
            memory(Path(folder) / "reading", epochs=2 if quick else 10),
            sharding(Path(folder) / "sharding", images=300 if quick else 2000, pairs=2 if quick else 5),
        ]
    show("data", rows, json)


def section(folder: Path, **changes: Any) -> Data:
    """The recipe section for shards below `folder`."""
    usual = {"source": str(folder / "images"), "shards": folder, "images": {"size": 64}}
    return Data.model_validate(usual | {"workers": 0} | changes)


def write_shards(folder: Path, shards: int, samples: int, shape: tuple[int, ...], tokens: int) -> list[Path]:
    """Encoded shards with their index. The first is written, the others are further names for it."""
    encoded = folder / "encoded"
    encoded.mkdir(parents=True)
    first = encoded / "train-000000.tar"
    with first.open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as writer:
        for number in range(samples):
            prompt = Prompt(((torch.randn(1, tokens, WIDTH), None),))
            stored = Stored(torch.randn(shape), Size(8 * shape[1], 8 * shape[2]), {"": prompt})
            content = {"txt": b"a caption of some words", "safetensors": stored.write()}
            writer.write({"__key__": f"{number:06d}", **content})
    with first.open("rb") as written:
        entry = describe(first, scan(written)[0], shapes={"x".join(map(str, shape)): list(range(samples))})
    entries = [entry.model_copy(update={"name": f"train-{number:06d}.tar"}) for number in range(shards)]
    for other in entries[1:]:
        os.link(first, encoded / other.name)
    Index(shards=entries).write(encoded / "index.json")
    return [encoded / entry.name for entry in entries]


def stream_of(data: Data) -> MicroBatchStream:
    """Our loader."""
    return MicroBatchStream(data, "train", MICRO_BATCH, 0, data.shards / "bad.log")


def rate(samples: int, run: Callable[[], object]) -> float:
    """Samples a second."""
    began = time.perf_counter()
    run()
    return samples / (time.perf_counter() - began)


def decode_sample(sample: dict[str, Any]) -> Sample:
    """Our decoding of a sample as webdataset gives it."""
    return decode(f"shard:{sample['__key__']}", sample)


def together(samples: list[Sample]) -> Batch:
    """A micro-batch."""
    return Batch(tuple(samples))


def bare(paths: list[Path], workers: int) -> Iterator[Batch]:
    """One epoch of a bare webdataset pipeline with our decoding, in stored order."""
    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(path) for path in paths]),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.map(decode_sample),
        wds.batched(MICRO_BATCH, collation_fn=together),
    )
    return iter(DataLoader(pipeline, batch_size=None, num_workers=workers))


def raw(paths: list[Path]) -> None:
    """Every byte of every member, nothing else."""
    for path in paths:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                file.read()


def exhaust(batches: Iterator[Any], count: int) -> None:
    """Take the first and, from then on, as many as there are in an epoch."""
    assert sum(1 for _ in islice(batches, count)) == count


def reading(folder: Path, shards: int, samples: int, pairs: int) -> Iterator[Row]:
    """Samples a second of one process, and of one with a worker process."""
    paths = write_shards(folder, shards, samples, LATENTS, TOKENS)
    total, count = shards * samples, shards * samples // MICRO_BATCH
    data = section(folder)
    note = f"{total} samples of 192 KiB in {shards} shards, micro-batches of {MICRO_BATCH}"
    for workers, where in ((0, "in the process itself"), (1, "in one worker process, which has started")):
        ours, theirs = [], []
        for _ in range(pairs):
            # A worker's start is no part of it; what it has read ahead by then is, on both sides.
            own = stream_of(data.model_copy(update={"workers": workers})).take(0, 1)
            next(own)
            ours.append(rate(total, partial(exhaust, own, count - 1)))
            others = bare(paths, workers)
            next(others)
            theirs.append(rate(total, partial(exhaust, others, count - 1)))
        yield row_of_pairs(f"loader / bare webdataset, {where}", ours, theirs, "samples/s", note)
    ours = [rate(total, partial(exhaust, stream_of(data).take(0, 1), count)) for _ in range(pairs)]
    theirs = [rate(total, partial(raw, paths)) for _ in range(pairs)]
    yield row_of_pairs("loader / raw tar reading", ours, theirs, "samples/s", f"{note}; raw reading decodes nothing")


def resuming(folder: Path, shards: int, pairs: int) -> Iterator[Row]:
    """Seconds from a new process's first line to the next micro-batch, at both ends of a large epoch."""
    samples = 1000
    write_shards(folder, shards, samples, (1, 4, 4), 1)
    data = section(folder)
    last = shards * samples // MICRO_BATCH - 1
    times: dict[int, list[float]] = {0: [], last: []}
    for _ in range(pairs):
        for number, seconds in times.items():
            began = time.perf_counter()
            next(stream_of(data).take(number, 1))
            seconds.append(time.perf_counter() - began)
    note = f"{shards * samples} samples in {shards} shards; index, order and first micro-batch"
    yield row_of_pairs("resume at the end / at the beginning of an epoch", times[last], times[0], "s", note)
    some = last // 20
    began = time.perf_counter()
    exhaust(stream_of(data).take(0, 1), some)
    whole = (time.perf_counter() - began) * last / some
    yield row(
        "resume at the end / reading up to there",
        times[last][0],
        whole,
        "s",
        f"{note}; reading measured over 1/20 of it",
    )


def memory(folder: Path, epochs: int) -> Row:
    """What the process holds at the end over what it held after a tenth."""
    stream = stream_of(section(folder))
    batches = stream.take(0, 1)
    count = epochs * len(stream) // MICRO_BATCH
    exhaust(batches, count // 10)
    early = memory_now()["RssAnon"]
    exhaust(batches, count - count // 10)
    late = memory_now()["RssAnon"]
    note = f"{epochs} epochs of {len(stream)} samples, {count * MICRO_BATCH * 192 // 1024} MiB read"
    return row("memory at the end / after a tenth", late / MIB, early / MIB, "MiB", note)


def sharding(folder: Path, images: int, pairs: int) -> Row:
    """Images a second of `shard` with one worker, and of a loop that does nothing but write."""
    source = folder / "images"
    source.mkdir(parents=True)
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    for number in range(images):
        picture.save(source / f"{number:05d}.jpg", quality=90)
        (source / f"{number:05d}.txt").write_text("a caption of some words")
    ours, theirs = [], []
    for pair in range(pairs):
        ours.append(rate(images, partial(shard, section(folder / f"{pair}", source=str(source)), workers=1)))
        theirs.append(rate(images, partial(plain_shards, source, folder / f"plain {pair}")))
    note = f"{images} images of 128 x 128; ours reads headers and captions, splits, and writes an index with SHA-256"
    return row_of_pairs("shard, one worker / plain ShardWriter loop", ours, theirs, "images/s", note)


def plain_shards(source: Path, folder: Path) -> None:
    """The loop of webdataset's own examples."""
    folder.mkdir()
    with wds.ShardWriter(f"{folder}/plain-%06d.tar", maxcount=1000, verbose=0) as writer:
        for path in sorted(source.glob("*.jpg")):
            content = {"jpg": path.read_bytes(), "txt": path.with_suffix(".txt").read_bytes()}
            writer.write({"__key__": path.stem, **content})


if __name__ == "__main__":
    typer.run(main)
