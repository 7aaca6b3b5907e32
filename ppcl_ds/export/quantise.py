"""Quantised weights, by diffusers' own quantisation configurations, so that `from_pretrained` needs to be told nothing.

Unlike the rest of an export this is not streamed: the backends quantise a model that is loaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_ds import memory
from ppcl_ds.errors import UserError

PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
"""Method -> the package that implements it. All of them quantise the weights of linear layers and nothing else."""


def check_backend(method: str) -> None:
    """Find out, before anything is written, whether this machine can quantise so.

    Raises:
        UserError: the package is missing, or the method needs a GPU and there is none.
    """
    package = PACKAGES[method]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--quantize {method} needs {package}, which is not installed; run: pip install {package}")
    if method == "nf4" and not torch.cuda.is_available():
        raise UserError("--quantize nf4 needs a GPU: diffusers does not load bitsandbytes weights on a CPU")


def quantise(model_class: Any, source: Path, out: Path, method: str, dtype: torch.dtype, max_shard_size: int) -> None:
    """Write a quantised copy of a model folder.

    Args:
        source: a diffusers model folder that is not quantised.
        dtype: of what stays unquantised, and of the arithmetic.

    Raises:
        UserError: the GPU's memory is too small.
    """
    config = _config(method, dtype)
    other = "take a larger GPU" if method == "nf4" else "CUDA_VISIBLE_DEVICES= quantises on the CPU"
    with memory.told(f"--quantize {method} of {source}", other):
        model: nn.Module = model_class.from_pretrained(source, quantization_config=config, torch_dtype=dtype)
    # The folder it was read from is gone in a moment, so its name must not travel in config.json.
    model.register_to_config(_name_or_path="")  # type: ignore[operator]
    model.save_pretrained(out, max_shard_size=max_shard_size)  # type: ignore[operator]


def _config(method: str, dtype: torch.dtype) -> Any:
    # The packages are optional, so they are imported where they are used.
    if method == "nf4":
        from diffusers import BitsAndBytesConfig

        # bitsandbytes puts a plain linear in the place of every one, also of those that add to their input.
        skipped = ["text_in", "text_out"]
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if method == "int8" else Float8WeightOnlyConfig())
