"""A teacher's or a variant's folder as a model that draws: the one place where folders are loaded for use."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from ppcl_ds.errors import UserError, brief
from ppcl_ds.export.card import read_facts
from ppcl_ds.export.controlnet import spread_residuals
from ppcl_ds.export.model_folder import FACTS
from ppcl_ds.teacher import modeling_pruned
from ppcl_ds.teacher.files import ModelFiles
from ppcl_ds.teacher.pipeline_files import open_pipeline, read_index

_FAULTS = (OSError, ValueError, RuntimeError, ImportError, AttributeError, SafetensorError)
"""What diffusers raises for folders that are incomplete, damaged or of a release that it does not know."""


def load_model(folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The transformer in a folder that `ppcl consolidate` or `save_pretrained` wrote, on the CPU, ready to draw.

    Args:
        folder: with `config.json` and safetensors, or a pipeline folder with `transformer/`.
        dtype: of the weights; what a family keeps in float32 stays so.

    Raises:
        UserError: there is no such model, or its files cannot be read.
    """
    files = ModelFiles(Path(folder).expanduser())
    assert files.model_class is not None
    model_class: Any = files.model_class
    try:
        return model_class.from_pretrained(files.folder, torch_dtype=dtype)
    except _FAULTS as fault:
        raise UserError(f"model {folder}: cannot be loaded ({brief(fault)[:300]})") from None


def load_pipeline(folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> DiffusionPipeline:
    """The pipeline in a diffusers folder, on the CPU; nothing is downloaded.

    The transformer of a variant takes ControlNets of the teacher, see `spread_residuals`.

    Args:
        folder: with `model_index.json`.
        dtype: of all its models.

    Raises:
        UserError: there is no such pipeline, or its files cannot be read.
    """
    folder = Path(folder).expanduser()
    pipeline = _opened(folder, dtype)
    if (folder / FACTS).exists():
        facts = read_facts(folder)
        if facts.spans:
            spread_residuals(getattr(pipeline, facts.component), facts.spans)
    return pipeline


def _opened(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    index = read_index(folder)
    if isinstance(index["_class_name"], list):  # a class of ours
        return open_pipeline(folder, ("",), dtype=dtype)
    own = _own_models(index, folder, dtype)
    try:
        with warnings.catch_warnings():
            # The older ones of the supported releases know no other name for it.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            return DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, **own)
    except _FAULTS as fault:
        raise UserError(f"pipeline {folder}: cannot be loaded ({brief(fault)[:300]})") from None


def _own_models(index: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The pipeline's transformers that are of our classes; the code in the folder need not be trusted then."""
    module = modeling_pruned.__name__.rpartition(".")[2]
    # diffusers looks up the class that the index names even where it is given the model, and imports nothing unknown.
    sys.modules.setdefault(module, modeling_pruned)
    ours = [name for name, value in index.items() if isinstance(value, list) and value[:1] == [module]]
    return {name: load_model(folder / name, dtype) for name in ours}
