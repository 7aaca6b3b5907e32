"""`ppcl sample`: images by a whole pipeline, such as a variant's folder."""

from __future__ import annotations

import inspect
import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont

from ppcl_ds import launch, memory
from ppcl_ds.atomic import atomic_write
from ppcl_ds.console import progress
from ppcl_ds.errors import UserError, brief
from ppcl_ds.evaluate.painter import guided
from ppcl_ds.export.load import load_pipeline
from ppcl_ds.export.placing import place_pipeline


def sample(
    folder: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    size: int | None = None,
) -> None:
    """Draw one image a prompt and write them side by side; of a clip, the frame in its middle.

    Every prompt starts from the same noise and is drawn by itself, so that its image does not depend on the others.

    Args:
        folder: a pipeline.
        out: a PNG file.
        steps, guidance, size: default: the pipeline's own.

    Raises:
        UserError: the folder is none, the size is not possible, or something in the folder is damaged.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: images are written as PNG; give a name that ends in .png")
    if not folder.is_dir():
        raise UserError(f"model {folder}: there is no such folder")
    if not (folder / "model_index.json").exists():
        raise UserError(f"model {folder}: no model_index.json in it; give a pipeline folder, such as pruned/small")
    images = _by_pipeline(folder, prompts, seed, steps, guidance, size)
    try:
        atomic_write(out, as_columns(images, prompts))
    except OSError as fault:
        raise UserError(f"--out {out}: {fault.strerror}") from None
    print(f"wrote {out}")


def _by_pipeline(
    folder: Path, prompts: Sequence[str], seed: int, steps: int | None, guidance: float | None, size: int | None
) -> list[Image.Image]:
    """As diffusers' own `__call__` draws them."""
    device = launch.device()
    pipeline: Any = load_pipeline(folder, torch.bfloat16 if device.type == "cuda" else torch.float32)
    known = inspect.signature(pipeline.__call__).parameters
    options: dict[str, Any] = {"num_inference_steps": steps or known["num_inference_steps"].default}
    if size is not None:
        multiple = 2 * getattr(pipeline, "vae_scale_factor", 8)  # pixels of a token
        if size % multiple:  # diffusers would draw another size, and not say so
            raise UserError(f"--size {size} is not possible: {folder} draws multiples of {multiple} pixels")
        options |= {"height": size, "width": size}
    options |= guided(pipeline, pipeline.transformer, guidance)
    if "output_type" in known:
        options["output_type"] = "pil"
    pipeline.set_progress_bar_config(disable=True)
    images = []
    with _explained(folder, size), progress("steps", len(prompts) * options["num_inference_steps"]) as advance:

        def on_step(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            advance(1)
            return tensors

        watched = {"callback_on_step_end": on_step} if "callback_on_step_end" in known else {}
        if kept := place_pipeline(pipeline, device):
            print(f"{folder} does not fit on the GPU: {kept} stay in CPU memory, and drawing is slower", flush=True)
        for prompt in prompts:
            drawn = pipeline(prompt, generator=torch.Generator().manual_seed(seed), **watched, **options)
            if not watched:
                advance(options["num_inference_steps"])
            if hasattr(drawn, "frames"):
                images.append(drawn.frames[0][len(drawn.frames[0]) // 2])
            elif hasattr(drawn, "images"):
                images.append(drawn.images[0])
            else:
                raise UserError(f"{folder} is a {type(pipeline).__name__}, which draws neither images nor clips")
    return images


@contextmanager
def _explained(folder: Path, size: int | None) -> Iterator[None]:
    """What a model says to a size that it cannot draw, or that does not fit the GPU, as one line."""
    try:
        with memory.told(str(folder), "try a smaller --size, or draw on the CPU with CUDA_VISIBLE_DEVICES="):
            yield
    except ValueError as fault:
        if size is None:
            raise
        raise UserError(f"--size {size} is not possible: {brief(fault)}") from None


_LEAST = 128
"""Smaller images are enlarged to about this width, by a whole number, so that they can be seen."""
_GAP, _TEXT = 8, 12
"""Pixels between columns, and of the letters' height."""


def as_columns(images: Sequence[Image.Image], prompts: Sequence[str]) -> bytes:
    """One row of images of one size, their prompts below, as a PNG."""
    factor = max(1, _LEAST // images[0].width)
    width, height = (side * factor for side in images[0].size)
    # matplotlib's own font is there on every machine.
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _TEXT)
    texts = ["\n".join(textwrap.wrap(prompt, int(width / font.getlength("e")))) for prompt in prompts]
    lines = max(1 + text.count("\n") for text in texts)
    size = (len(images) * (width + _GAP) - _GAP, height + _GAP + lines * (_TEXT + 4))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for column, (image, text) in enumerate(zip(images, texts, strict=True)):
        left = column * (width + _GAP)
        page.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, 0))
        pen.multiline_text((left, height + _GAP // 2), text, fill="black", font=font, spacing=2)
    buffer = io.BytesIO()
    page.save(buffer, format="PNG")
    return buffer.getvalue()
