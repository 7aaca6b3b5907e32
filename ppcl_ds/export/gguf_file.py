"""A variant as a GGUF file, as ComfyUI-GGUF, stable-diffusion.cpp and diffusers read it; a tensor at a time in memory.

Names are those of single files. Matrices inside the blocks are quantised; what is small, lies outside the blocks or is
no matrix stays in float32, as the tools' own converters leave it. K-quants need stable-diffusion.cpp's converter.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppcl_ds.atomic import fsync
from ppcl_ds.errors import UserError
from ppcl_ds.export.names import load_names
from ppcl_ds.export.single_files import is_block_matrix, single_file_tensors
from ppcl_ds.teacher.files import Source, Sources
from ppcl_ds.units.variant import Layout

TYPES = ("F16", "BF16", "Q8_0", "Q5_0", "Q4_0")
"""What the `gguf` package quantises to without a compiler, and how `general.file_type` calls it."""

_LONGEST = 127


def check_package() -> None:
    """Find out, before anything is written, whether the `gguf` package is there.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--gguf needs the package gguf, which is not installed; run: pip install 'ppcl-ds[gguf]'")


def gguf_tensors(layout: Layout, tool: str) -> tuple[str, Sources]:
    """The architecture's name, and the tensors by the names that the file is to have.

    Args:
        tool: a key of `single_files.TOOLS`.

    Raises:
        UserError: the tool could not load this model.
    """
    tensors = {name: source for name, source in single_file_tensors(layout, tool).items() if source.shape.numel()}
    if longest := next((name for name in tensors if len(name) > _LONGEST), None):
        raise UserError(f"--gguf: '{longest}' is longer than the {_LONGEST} letters that a GGUF file has for a name")
    return load_names()[str(layout.config["_class_name"])].arch, tensors


def write_gguf(arch: str, tensors: Sources, path: Path, kind: str) -> None:
    """Write one GGUF file.

    Args:
        arch: see `names.yaml`.
        kind: of `TYPES`.

    Raises:
        UserError: a tensor cannot be read.
        OSError: the file cannot be written.
    """
    import gguf  # optional, so imported where it is used

    types = {name: _type(name, source, gguf.GGMLQuantizationType[kind]) for name, source in tensors.items()}
    writer: Any = gguf.GGUFWriter(path=None, arch=arch)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for name, source in tensors.items():
        elements, size = gguf.GGML_QUANT_SIZES[types[name]]
        stored = source.shape.numel() // elements * size
        writer.add_tensor_info(name, tuple(source.shape), np.dtype(np.float32), stored, raw_dtype=types[name])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, source in tensors.items():
        writer.write_tensor_data(gguf.quants.quantize(source.load().to(torch.float32).numpy(), types[name]))
    writer.close()
    fsync(path)


def _type(name: str, source: Source, wanted: Any) -> Any:
    import gguf

    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    fits = is_block_matrix(name, source) and source.shape[-1] % block == 0
    return wanted if fits else gguf.GGMLQuantizationType.F32
