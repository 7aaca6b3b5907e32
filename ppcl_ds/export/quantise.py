"""Quantised weights, by diffusers' own quantisation configurations, so that `from_pretrained` needs to be told nothing.

Unlike the rest of an export this is not streamed: the backends quantise a model that is loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ppcl_ds import launch, memory
from ppcl_ds.errors import UserError
from ppcl_ds.export.card import Quantised
from ppcl_ds.export.placing import placed, size_of, usable
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.drawing import Drawing
from ppcl_ds.teacher.heldout import HeldOut, mean_squared
from ppcl_ds.teacher.noising import DTYPES, NoisyStream
from ppcl_ds.teacher.pipeline_call import Arguments
from ppcl_ds.teacher.teacher import Teacher, forward

PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
"""Method -> the package that implements it. All of them quantise the weights of linear layers and nothing else."""

_STEPS, _DRAWN = 4, 8
"""Of the sampler, and latents drawn: few steps show an error of the weights most, as nothing corrects it."""


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


def cost(recipe: Recipe, teacher: Teacher, plain: Path, quantised: Path, model_class: Any, method: str) -> Quantised:
    """How far a quantised model is from the plain one: velocities on held-out data, and latents drawn in a few steps.

    Raises:
        UserError: the GPU's memory is too small.
    """
    device, running = launch.device(), DTYPES[recipe.teacher.precision]
    heldout = HeldOut(recipe, teacher, device)
    alone = len(teacher.call.transformers()) == 1
    drawings = _drawings(recipe, teacher) if alone else []
    velocities, latents = [], []
    for each in (plain, quantised):
        model = model_class.from_pretrained(each, torch_dtype=running).eval()

        def answer(arguments: Arguments, model: nn.Module = model) -> Tensor:
            return forward(model, pytree.tree_map_only(Tensor, lambda t: t.to(device), arguments)).cpu()

        with (
            memory.told(f"measuring {each}", "lower evaluate.batch_size"),
            placed(model, device, size_of(model) <= usable(device)),
        ):
            velocities.append(heldout.velocities(model))
            latents.append([drawing.draw({teacher.component: answer})[0] for drawing in drawings])
        del model, answer
    found = Quantised(
        method=method,
        package=PACKAGES[method],
        velocity_mse=mean_squared(*velocities),
        velocity_power=_power(velocities[0]),
    )
    if not alone:
        return found
    return found.model_copy(
        update={"drawn_mse": mean_squared(*latents), "drawn_power": _power(latents[0]), "draw_steps": _STEPS}
    )


def _drawings(recipe: Recipe, teacher: Teacher) -> list[Drawing]:
    """Of the first held-out captions."""
    stored = NoisyStream(recipe, teacher.call, "heldout", 1, captions=True)
    samples = [batch.samples[0] for _, batch in islice(stored.clean.take(0, 1), _DRAWN)]
    return Drawing.several(recipe, teacher.call, stored.noiser, samples, recipe.evaluate.batch_size, steps=_STEPS)


def _power(values: Sequence[Tensor]) -> float:
    return mean_squared(values, [torch.zeros(())] * len(values))


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
