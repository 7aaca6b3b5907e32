"""Streaming a laid-out model to disk: one shard at a time is in memory, whatever the size of the model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.serialization._base import parse_size_to_int
from safetensors.torch import save_file

from ppcl_ds.atomic import fsync, sha256
from ppcl_ds.errors import UserError
from ppcl_ds.teacher import modeling_pruned
from ppcl_ds.teacher.files import Sources
from ppcl_ds.units.variant import Layout

SUMS = "SHA256SUMS"
MODELING = Path(modeling_pruned.__file__).stem
CARD = "README.md"
FACTS = "variant.json"
"""What the card is made from. It also marks a folder as one that `ppcl consolidate` may replace."""


def shard_bytes(size: str) -> int:
    """`5GB`, `500MB`, ... as bytes.

    Raises:
        UserError: it is no size.
    """
    try:
        found = parse_size_to_int(size)
    except ValueError:
        found = 0
    if found <= 0:
        raise UserError(f"--max-shard-size: '{size}' is no size; write it as 5GB or 500MB") from None
    return found


def write_model(layout: Layout, folder: Path, max_shard_size: int) -> None:
    """Write a diffusers model folder, file for file what `save_pretrained` writes; and the code of a class of ours.

    Args:
        folder: is made; anything in it stays.
        max_shard_size: bytes; a tensor that is larger gets a shard of its own.

    Raises:
        UserError: a tensor cannot be read.
        OSError, SafetensorError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(layout.config, folder)
    add_own_code(folder)
    split = split_state_dict_into_shards_factory(
        dict(layout.tensors),
        get_storage_size=lambda source: source.bytes,
        filename_pattern=SAFETENSORS_WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        write_file({name: layout.tensors[name] for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def has_own_code(config: Mapping[str, Any]) -> bool:
    """Whether a model is of a class that diffusers does not have."""
    return hasattr(modeling_pruned, str(config.get("_class_name")))


def add_own_code(folder: Path) -> None:
    """Put the code of a class that diffusers does not have into a model folder, and say so in its `config.json`."""
    config = json.loads((folder / "config.json").read_text())
    if has_own_code(config):
        shutil.copyfile(modeling_pruned.__file__, folder / f"{MODELING}.py")
        _write_config(config | {"auto_map": {"AutoModel": f"{MODELING}.{config['_class_name']}"}}, folder)


def _write_config(config: Mapping[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_file(tensors: Sources, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file; all its tensors are in memory meanwhile.

    Raises:
        UserError, OSError, SafetensorError: as for `write_model`.
    """
    loaded = {name: source.load().contiguous() for name, source in tensors.items()}
    save_file(loaded, path, {"format": "pt", **(metadata or {})})
    # Now and not at the end: the disk is at work while the next shard is read, and dirty pages do not pile up.
    fsync(path)


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` of every file below the folder but the card, which is there to be edited.

    `sha256sum -c SHA256SUMS`, run in the folder, checks them.
    """
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (SUMS, CARD):
            lines.append(f"{sha256(path)}  {name}\n")
    (folder / SUMS).write_text("".join(lines))


def weights_digest(folder: Path) -> str | None:
    """Which weights a variant's folder holds, as one number; None where it has no `SHA256SUMS` to tell by."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except OSError:
        return None
    return hashlib.sha256("\n".join(line for line in lines if "  transformer" in line).encode()).hexdigest()
