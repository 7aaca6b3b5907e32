"""A pipeline folder as its transformer's caller: everything that says how, nothing that is heavy."""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from ppcl_ds.errors import UserError, brief
from ppcl_ds.teacher import modeling_pruned

INDEX = "model_index.json"
_PACKAGE = __name__.partition(".")[0]

Encodes = Literal["nothing", "text", "all"]
"""What will be encoded: captions, or captions and images."""


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline folder says it holds.

    Raises:
        UserError: it is no pipeline folder.
    """
    try:
        index = dict(json.loads((folder / INDEX).read_text()))
        index["_class_name"]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{folder}: no readable {INDEX}; give a diffusers pipeline folder") from None
    return index


def open_pipeline(
    folder: Path, real: Collection[str] = (), device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Any:
    """The pipeline of a folder, a stock one or ours, of which only some models have weights.

    The others are empty: parameters on the meta device, buffers real.

    Args:
        real: components that are loaded whole; names, or beginnings of names.
        device: where those are.
        dtype: of those, and of transformers; None: float32.

    Raises:
        UserError: the folder, or a component in it, cannot be read.
    """
    index = read_index(folder)
    found = _pipeline_class(folder, index["_class_name"])
    accepted = inspect.signature(found).parameters
    parts: dict[str, Any] = {}
    for key in accepted:
        value = index.get(key)
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value):
            whole = key.startswith(tuple(real)) if real else False
            parts[key] = _component(folder, key, value[0], value[1], whole, device, dtype)
        elif key in index and value != [None, None]:
            parts[key] = value  # numbers or words that the pipeline is made with
        elif (
            key != "self"
            and accepted[key].default is inspect.Parameter.empty
            and accepted[key].kind
            not in (
                inspect.Parameter.VAR_KEYWORD,
                inspect.Parameter.VAR_POSITIONAL,
            )
        ):
            parts[key] = None
    pipeline = found(**parts)
    pipeline.set_progress_bar_config(disable=True)
    # A warning for each caption that is cut would bury everything else.
    logging.get_logger(found.__module__).setLevel(logging.ERROR)
    for part in parts.values():
        if isinstance(part, PreTrainedTokenizerBase):
            part.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return pipeline


def _pipeline_class(folder: Path, named: Any) -> Any:
    """The class of a pipeline, which an index names by itself, or with its module if it is not of diffusers."""
    library, name = named if isinstance(named, list) and len(named) == 2 else ("diffusers", named)
    found = _find_class(folder, str(library), str(name))
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise UserError(f"{folder}: {INDEX} names '{name}', which this diffusers does not have")
    return found


def _find_class(place: Path, library: str, name: str) -> Any:
    """A class that an index names, or None if there is no such class.

    A module of ours that travels in a folder is named there in full. Its classes are taken from the package: code in
    a pipeline folder is never run, and a folder that an earlier release wrote gets today's.

    Args:
        place: the folder where the module lies if it is none of a library's.

    Raises:
        UserError: it is the folder's own code.
    """
    known = {"diffusers": diffusers, "transformers": transformers}
    module = known.get(library) or getattr(diffusers.pipelines, library, None)
    if library.startswith(f"{_PACKAGE}."):
        try:
            module = importlib.import_module(library)
        except ImportError:
            return None  # another release's
    elif library == modeling_pruned.__name__.rpartition(".")[2]:
        module = modeling_pruned
    elif module is None and (place / f"{library}.py").is_file():
        raise UserError(
            f"{place}: {name} is code of its own ({library}.py), which is not run; use a class of diffusers"
        )
    return getattr(module, name, None) if module else None


def _component(
    folder: Path, key: str, library: str, class_name: str, whole: bool, device: torch.device | str, dtype: Any
) -> Any:
    found = _find_class(folder / key, library, class_name)
    if found is None:
        raise UserError(f"{folder}: {key} is a {library}.{class_name}, which is not known here")
    is_model = isinstance(found, type) and issubclass(found, nn.Module)
    try:
        if not is_model:  # schedulers, tokenizers and processors weigh nothing
            return (
                found.from_pretrained(folder, subfolder=key, local_files_only=True) if (folder / key).is_dir() else None
            )
        if whole:
            with warnings.catch_warnings():
                # The older ones of the supported releases know no other name for it.
                warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
                disable_progress_bar()
                try:
                    model = found.from_pretrained(
                        folder, subfolder=key, torch_dtype=dtype or torch.float32, local_files_only=True
                    )
                finally:
                    enable_progress_bar()
            return model.eval().requires_grad_(False).to(device)
        # Only the transformer's own dtype decides what it is given; layouts are learned in float32.
        model = _empty(folder / key, found)
        return nn.Module.to(model, dtype) if dtype and "transformer" in key else model  # diffusers' own warns
    except UserError:
        raise
    except Exception as fault:  # whatever a reader of a damaged file raises
        raise UserError(f"{folder}: cannot load {key} ({brief(fault)[:300]})") from None


def _empty(folder: Path, model_class: Any) -> nn.Module:
    """A model with parameters on the meta device, and buffers as they are stored (FLUX.2's VAE normalises by some)."""
    with init_empty_weights(include_buffers=False):
        if issubclass(model_class, PreTrainedModel):
            model = model_class(model_class.config_class.from_pretrained(folder, local_files_only=True))
        else:
            model = model_class.from_config(json.loads((folder / "config.json").read_text()))
    buffers = dict(model.named_buffers())
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in set(opened.keys()) & buffers.keys():
                    buffers[name].copy_(opened.get_tensor(name))
        except (OSError, SafetensorError) as fault:
            place = f"{folder.parent}: {folder.name}/{file.name}"
            raise UserError(f"{place} cannot be read ({brief(fault)}); copy it again") from None
    return model.eval().requires_grad_(False)


def encoders(folder: Path, encodes: Encodes) -> list[str]:
    """All components of a pipeline but its transformers, and but its VAE, if there are no images."""
    listed = [name for name, value in read_index(folder).items() if isinstance(value, list)]
    left = ("_class_name", *(["vae"] if encodes == "text" else []))
    return [name for name in listed if name not in left and "transformer" not in name]
