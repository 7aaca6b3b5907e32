"""A whole stock pipeline that draws by one model after another: whole on this rank, or spread over all ranks."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ppcl_ds.errors import UserError, brief, shown
from ppcl_ds.export.load import load_model, load_pipeline
from ppcl_ds.export.placing import usable
from ppcl_ds.recipe import Recipe, teacher_config
from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.teacher.own import own_of
from ppcl_ds.teacher.pipeline_files import open_pipeline, read_index
from ppcl_ds.teacher.pipeline_run import SOURCES
from ppcl_ds.teacher.teacher import Teacher


def guided(pipeline: Any, transformer: Any, scale: float | None) -> dict[str, Any]:
    """Arguments of a stock pipeline's call for classifier-free guidance; None: its own."""
    if scale is None:
        return {}
    embeds = transformer.config.get("guidance_embeds")
    if "true_cfg_scale" in inspect.signature(pipeline.__call__).parameters and not embeds:
        return {"true_cfg_scale": scale, "negative_prompt": " "}  # guided by an empty prompt only if it is given one
    return {"guidance_scale": scale}


def call_options(recipe: Recipe, teacher: Teacher) -> dict[str, Any]:
    """Arguments of the stock pipeline's call for every prompt, its size and generator left out.

    Raises:
        UserError: it draws from source images.
    """
    call = teacher.call
    if call.edits:
        raise UserError(f"evaluate.sets: {teacher.path} draws from source images, which sets of prompts do not have")
    settings = recipe.evaluate
    scale = None if call.embeds_guidance and settings.guidance <= 1 else settings.guidance
    own = dict(own_of(teacher.class_name).options) | dict(recipe.teacher.options)
    options = {"num_inference_steps": settings.steps} | guided(call.pipe, call.transformer, scale) | own
    return {name: value for name, value in options.items() if name in call.parameters and name not in SOURCES}


def needs_sharding(recipe: Recipe, teacher: Teacher, device: torch.device) -> bool:
    """Whether models are spread over all ranks while they draw prompt sets."""
    sharded = recipe.evaluate.sharded
    return not fits(recipe, teacher, device, around=True) if sharded is None else sharded


def fits(recipe: Recipe, teacher: Teacher, device: torch.device, around: bool) -> bool:
    """Whether the teacher's weights fit on a device; the CPU has room for any.

    Args:
        around: with the rest of its pipeline; else with its other transformers alone.
    """
    if device.type != "cuda":
        return True
    item = DTYPES[recipe.teacher.precision].itemsize
    transformer = item * sum(parameter.numel() for parameter in teacher.empty.parameters())
    others = sum(
        file.stat().st_size
        for file in teacher.path.glob("*/*.safetensors")
        if file.parent.name != recipe.teacher.component and (around or file.parent.name in teacher.call.transformers())
    )
    return transformer + others <= usable(device)


class Painter:
    """Draws prompts one by one, by the stock pipeline's own call.

    Args:
        device: of this rank.
        sharded: whether models are spread over all ranks; these must then make, load and draw together.

    Raises:
        UserError: the pipeline cannot be loaded, or cannot be called so.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, device: torch.device, sharded: bool) -> None:
        self.recipe, self.teacher, self.device, self.sharded = recipe, teacher, device, sharded
        self.dtype = DTYPES[recipe.teacher.precision]
        self.options = call_options(recipe, teacher)
        self.loaded = "" if sharded else "teacher"
        if sharded:
            listed = read_index(teacher.path).items()
            parts = [name for name, value in listed if isinstance(value, list) and name[0] != "_"]
            real = [name for name in parts if name != teacher.component]
            self.pipeline = open_pipeline(teacher.path, real, device, self.dtype)
        else:
            self.pipeline = load_pipeline(teacher.path, self.dtype)
            self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def load(self, name: str) -> None:
        """Draw by another model from now on.

        Raises:
            UserError: it cannot be loaded.
        """
        if name == self.loaded:
            return
        self._replace(None)
        folder = self.teacher.files.folder if name == "teacher" else self.recipe.pruned(name)
        if self.sharded:
            self._replace(self._spread(self.teacher if name == "teacher" else self._opened(folder.parent)))
        else:
            self._replace(load_model(folder, self.dtype).to(self.device))
        self.loaded = name

    @torch.no_grad()
    def draw(self, text: str, seed: int, size: int) -> Image.Image:
        """The image that a prompt becomes with the noise of a seed, which is the same on every device.

        Raises:
            UserError: the pipeline cannot draw it.
        """
        sides = {"height": size, "width": size}
        try:
            drawn = self.pipeline(text, generator=torch.Generator().manual_seed(seed), **sides, **self.options)
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.teacher.path}: the GPU's memory is too small; start more processes with evaluate.sharded: true"
            ) from None
        except (ValueError, TypeError, RuntimeError) as fault:
            raise UserError(f"{self.teacher.path} cannot draw '{shown(text, 60)}' ({brief(fault)})") from fault
        if not hasattr(drawn, "images"):
            raise UserError(f"{self.teacher.path} is a {type(self.pipeline).__name__}, which draws no images")
        image: Image.Image = drawn.images[0]
        if image.size != (size, size):  # some draw another size, and do not say so
            raise UserError(
                f"evaluate.sets: {self.teacher.path} draws {image.width} x {image.height} pixels, not {size} x {size}; "
                "set another size"
            )
        return image.convert("RGB")

    def _replace(self, model: nn.Module | None) -> None:
        """Give the pipeline another transformer; the one before is freed first."""
        setattr(self.pipeline, self.teacher.component, model)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _opened(self, folder: Path) -> Teacher:
        given = self.teacher
        return Teacher(folder, component=given.component, options=given.options, dtype=given.dtype, size=given.size)

    def _spread(self, model: Teacher) -> nn.Module:
        # DeepSpeed is imported by ranks only: it takes seconds and looks for accelerators.
        from ppcl_ds.teacher.sharded import load_teacher

        config, ranks = teacher_config(self.recipe), self.recipe.teacher.ranks_per_copy
        # Whole beside units is not yet whole beside text encoders and VAE.
        return _Spread(load_teacher(model, config, self.dtype, None if ranks == 1 else ranks), self.dtype)


class _Spread(nn.Module):
    """A ZeRO-3 engine as the transformer of a stock pipeline."""

    def __init__(self, engine: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.__dict__["engine"] = engine  # no submodule: nobody is to move its parameters
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a pipeline asks its transformer for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["engine"].module, name)


def described(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON holds them."""
    return {
        name: value if isinstance(value, str | int | float | None) else str(value) for name, value in options.items()
    }
