"""`ppcl-data encode`: raw shards become encoded ones, so that no encoder has to run while a model trains.

Shapes: C latent channels, H and W latent height and width, S text tokens, E embedding channels, P pooled channels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import safetensors.torch
import torch
import webdataset as wds
from PIL import Image, ImageOps
from torch import Tensor

from data_tools import shard
from ppcl_ds.console import progress
from ppcl_ds.data.batch import Prompts
from ppcl_ds.data.encoders import ImageEncoder, TextEncoder, image_encoder, text_encoder
from ppcl_ds.data.stream import Index, Sample, ShardEntry, read_samples
from ppcl_ds.errors import UserError
from ppcl_ds.sections import Data

COMMAND = "ppcl-data encode"
BATCH = 32
"""Samples that go through the encoders together."""

_AGAIN = f"delete `raw/` and run `{shard.COMMAND} RECIPE`"


def encode(data: Data) -> None:
    """Write `data.shards/encoded/`: one shard for each raw one, `empty.safetensors` and `index.json`.

    Every sample has the members KEY.txt, the caption, and KEY.safetensors, in bfloat16: `latents` (C, H, W),
    `prompt_embeds` (S, E) at the caption's own length and, for families that have one, `pooled` (P,). The empty
    caption is encoded likewise, without latents. An interrupted run goes on at the shard where it stopped; shards
    are encoded again when the recipe's encoders or their raw shard have changed, and only then.

    Raises:
        UserError: there are no raw shards, or a sample cannot be read; the message names shard and key.
    """
    raw, encoded = data.shards / "raw", data.shards / "encoded"
    source = Index.read(raw / "index.json", shard.COMMAND)
    settings = data.model_dump(mode="json", include={"images", "captions"})
    done, whole = _earlier_work(encoded, source, settings)
    if whole:
        print(f"{encoded}: already encoded, and neither the encoders nor the raw shards have changed")
        return
    encoded.mkdir(parents=True, exist_ok=True)
    journal = encoded / "index.partial.json"
    Index(shards=list(done.values()), settings=settings).write(journal)
    (encoded / "index.json").unlink(missing_ok=True)

    images, captions = image_encoder(data.images), text_encoder(data.captions)
    (encoded / "empty.safetensors").write_bytes(_pack(_prompt_tensors(captions.encode([""]))))
    total = sum(entry.samples for entry in source.shards)
    with progress("encoding", total, sum(entry.samples for entry in done.values())) as advance:
        for entry in source.shards:
            if entry.name not in done:
                if not entry.is_in(raw):
                    raise UserError(f"{raw / entry.name} is missing or cut short; run `{shard.COMMAND} RECIPE`")
                _encode_shard(raw / entry.name, encoded / entry.name, entry.samples, images, captions, advance)
                done[entry.name] = shard.describe(encoded / entry.name, entry.samples, raw_sha256=entry.sha256)
                Index(shards=list(done.values()), settings=settings).write(journal)
    Index(shards=[done[entry.name] for entry in source.shards], settings=settings).write(journal)
    os.replace(journal, encoded / "index.json")
    print(f"{encoded}: {total} samples (shards: {len(source.shards)})")


def _earlier_work(folder: Path, source: Index, settings: dict[str, object]) -> tuple[dict[str, ShardEntry], bool]:
    """Encoded shards that still hold, by name, and whether they are all there is to do."""
    path = folder / "index.json"
    if not path.exists():
        path = folder / "index.partial.json"
    if not path.exists():
        return {}, False
    index = Index.read(path, COMMAND)
    if index.settings != settings:
        return {}, False
    raw_sha256 = {entry.name: entry.sha256 for entry in source.shards}
    done = {
        entry.name: entry
        for entry in index.shards
        if raw_sha256.get(entry.name) == entry.raw_sha256 and entry.is_in(folder)
    }
    whole = path.name == "index.json" and (folder / "empty.safetensors").is_file()
    return done, whole and list(done) == list(raw_sha256) == [entry.name for entry in index.shards]


def _encode_shard(
    source: Path,
    target: Path,
    expected: int,
    images: ImageEncoder,
    captions: TextEncoder,
    advance: Callable[[int], None],
) -> None:
    """Encode one raw shard of `expected` samples into `target`, whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    written = 0
    with partial.open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as writer:
        samples = read_samples(source)
        while batch := list(islice(samples, BATCH)):
            for sample in _encode_batch(batch, source, images, captions):
                writer.write(sample)
            written += len(batch)
            advance(len(batch))
    if written != expected:
        raise UserError(
            f"{source} holds {written} samples, its index says {expected}; delete it and run `{shard.COMMAND} RECIPE`"
        )
    os.replace(partial, target)


def _encode_batch(batch: list[Sample], source: Path, images: ImageEncoder, captions: TextEncoder) -> Iterator[Sample]:
    latents = images.encode([_image(sample, source) for sample in batch])  # (B, C, H, W)
    prompts = captions.encode([_caption(sample, source) for sample in batch])
    for row, sample in enumerate(batch):
        tensors = {"latents": latents[row], **_prompt_tensors(prompts.row(row))}
        yield {"__key__": sample["__key__"], "txt": sample["txt"], "safetensors": _pack(tensors)}


def _image(sample: Sample, source: Path) -> Image.Image:
    name = f"{source}:{sample['__key__']}"
    suffix = next((suffix for suffix in shard.IMAGE_SUFFIXES if suffix in sample), None)
    if suffix is None:
        raise UserError(f"{name}: no image member ({', '.join(shard.IMAGE_SUFFIXES)}); {_AGAIN}")
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(sample[suffix])))
    except Exception as fault:  # PIL raises whatever the broken byte led to
        raise UserError(f"{name}: the {suffix} image cannot be decoded ({fault}); replace it and {_AGAIN}") from None


def _caption(sample: Sample, source: Path) -> str:
    try:
        return str(sample["txt"].decode()).strip()
    except (KeyError, UnicodeDecodeError):
        raise UserError(f"{source}:{sample['__key__']}: no caption in UTF-8 (.txt); {_AGAIN}") from None


def _prompt_tensors(prompt: Prompts) -> dict[str, Tensor]:
    """A prompt with B = 1, as it is stored."""
    tensors = {"prompt_embeds": prompt.embeds[0]}
    return tensors if prompt.pooled is None else {**tensors, "pooled": prompt.pooled[0]}


def _pack(tensors: dict[str, Tensor]) -> bytes:
    stored = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(stored)
