"""`ppcl import` of single files: what others published with fewer blocks, as a folder that stock diffusers loads.

A file says how many blocks it has, by its names; everything else is as in the base model, whose folder has to be given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ppcl_ds.errors import UserError
from ppcl_ds.export.names import PREFIX, from_file, load_names
from ppcl_ds.export.pipeline_folder import require_new, write_pipeline
from ppcl_ds.teacher.files import QUANTISED, ModelFiles, Source, empty_model, tensors_of
from ppcl_ds.teacher.flows import block_lists
from ppcl_ds.teacher.keys import find_keys
from ppcl_ds.teacher.own import own_of
from ppcl_ds.units.variant import laid_out


def import_file(source: Path, base: Path, out: Path, max_shard_size: int) -> None:
    """Write a single file as a diffusers folder.

    Args:
        source: a safetensors file, by the names of `names.yaml`.
        base: folder of the model that it was made from; its configuration and, of a pipeline, the other components.
        max_shard_size: bytes of a weights file.

    Raises:
        UserError: one line that says what is wrong.
    """
    require_new(out)
    files = ModelFiles(base, weights=False)
    names = load_names().get(files.class_name)
    if names is None or not names.names:
        raise UserError(f"{source}: how single files of {files.class_name} are named is not known here")
    stored = read_single_file(source)
    try:
        config = _config(files, _counted(stored, names.roots))
        tensors = from_file(names, empty_model(config).state_dict(), stored)
    except UserError as fault:
        raise UserError(f"{source}: {fault}; is it of another model than {base}?") from None
    write_pipeline(laid_out(f"{source}", config, tensors), base, "diffusers", out, max_shard_size)


def read_single_file(path: Path) -> dict[str, Source]:
    """The tensors of a safetensors file, not loaded yet, without the prefix of whole checkpoints.

    Raises:
        UserError: it is no such file, or is damaged.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: only .safetensors files are read; a pickle file could run anything")
    try:
        stored = tensors_of(path)
    except (OSError, SafetensorError, ValueError) as fault:
        raise UserError(f"{path}: no readable safetensors file ({fault})") from None
    prefix = PREFIX if any(name.startswith(PREFIX) for name in stored) else ""
    found = {
        name[len(prefix) :]: Source(tensor.shape, tensor.dtype, partial(_loaded, path, name))
        for name, tensor in stored.items()
        if name.startswith(prefix)  # the others are a whole checkpoint's text encoders and VAE
    }
    if strange := next((name for name in found if name.endswith(QUANTISED)), None):
        raise UserError(f"{path}: is quantised (it has '{strange}'); import the plain file")
    return found


def _loaded(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as opened:
            return opened.get_tensor(name)
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{path}: cannot be read ({fault})") from None


def _counted(stored: Iterable[str], roots: Mapping[str, str]) -> dict[str, int]:
    """diffusers' lists of blocks -> how many of them the file has.

    Raises:
        UserError: a number is missing.
    """
    numbers: dict[str, set[int]] = {}
    for name in stored:
        if match := re.match(r"(\w+)\.(\d+)\.", name):
            numbers.setdefault(roots.get(match[1], match[1]), set()).add(int(match[2]))
    for name, found in numbers.items():
        if found != set(range(len(found))):
            raise UserError(f"of its {name}, number {min(set(range(max(found))) - found)} is missing")
    return {name: len(found) for name, found in numbers.items()}


def _config(files: ModelFiles, counted: Mapping[str, int]) -> dict[str, Any]:
    """The base's configuration with as many blocks as the file has."""
    empty = files.empty_model()
    config = dict(files.config)
    keys = find_keys(files, empty, own_of(files.class_name).entries)
    for key, lists in keys.lengths.items():
        counts = {counted[name] for name in lists if name in counted}
        if len(counts) == 1:
            config[key] = counts.pop()
    for name, modules in block_lists(empty).items():
        if counted.get(name, len(modules)) > len(modules):
            raise UserError(f"it has {counted[name]} {name}, more than the {len(modules)} of the base")
    return config
