"""A run folder to time: a pipeline around a random Qwen-Image transformer of any size, shards, a plan, a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import yaml
from PIL import Image

from data_tools.encode import encode
from data_tools.shard import shard
from ppcl_ds.demo.pipeline import DigitsPipeline, PixelVae, WordTable
from ppcl_ds.recipe import load_recipe
from ppcl_ds.sections import Precision
from ppcl_ds.teacher.files import ModelFiles
from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.units.plan import Plan, UnitPlan

Span = tuple[int, int]

CHANNELS = 3
"""Latent channels: pixels are the latents."""
SAMPLES = 64
"""Images in the shards; read again and again."""


@dataclass(frozen=True)
class Workload:
    """What a step works on.

    Attributes:
        blocks, width: of the teacher.
        side: height and width of the latents; an image has `(side / 2) ** 2` tokens.
        words: text tokens of every caption.
        micro_batch: samples in a teacher forward.
        micro_batches: in an optimizer step, over all ranks.
        stages: pipeline stages, and ranks.
        head: channels of an attention head.
        precision: dtype of teacher and units, as a recipe names it; the teacher's files have it, too.
    """

    blocks: int
    width: int
    side: int = 32
    words: int = 16
    micro_batch: int = 4
    micro_batches: int = 2
    stages: int = 1
    head: int = 64
    precision: Precision = "fp32"

    def __str__(self) -> str:
        return (
            f"{self.blocks} blocks of width {self.width}, {(self.side // 2) ** 2} image and {self.words} text tokens, "
            f"{self.micro_batches} x {self.micro_batch} samples a step"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The precision as torch names it."""
        return DTYPES[self.precision]

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the teacher."""
        return {
            "patch_size": 2,
            "in_channels": 4 * CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": self.blocks,
            "attention_head_dim": self.head,
            "num_attention_heads": self.width // self.head,
            "joint_attention_dim": self.width,
            "axes_dims_rope": [16, (self.head - 16) // 2, (self.head - 16) // 2],
        }


def prepare(
    run: Path,
    work: Workload,
    variants: Mapping[str, Sequence[Span]],
    *,
    teacher: Path | None = None,
    checkpointing: bool = False,
) -> Path:
    """Fill the folder `run`; returns its recipe file.

    Args:
        variants: name -> spans of the variant's units; variants with a span in common share its unit.
        teacher: what `save_teacher` wrote for this workload; by default the run gets one of its own.
        checkpointing: whether units compute their activations again in the backward pass.
    """
    if teacher is None:
        teacher = run / "teacher"
        save_teacher(teacher, work)
    _write_images(run / "images", work)
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(_recipe(run, work, list(variants), teacher, checkpointing)))
    recipe = load_recipe(path)
    with redirect_stdout(StringIO()):  # they say how far they are
        shard(recipe.data)
        encode(recipe)
    plan_of(ModelFiles(teacher).class_name, work.blocks, variants).save(recipe.plan_file)
    return path


def save_teacher(folder: Path, work: Workload) -> None:
    """Write the workload's random teacher; see `save_pipeline`."""
    save_pipeline(folder, work.config, work.dtype, work.words)


def save_pipeline(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, words: int = 0, shard: str = "") -> int:
    """Write a pipeline around a random Qwen-Image transformer; pixels are its latents, words its text tokens.

    The transformer is made in its own dtype, so that a large one is never there in float32.

    Args:
        config: of the transformer.
        words: text tokens of every caption; 0: as many as it has words.
        shard: most bytes of a weights file, such as `200MB`; diffusers' own by default.

    Returns:
        Bytes of the transformer's parameters.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model = diffusers.QwenImageTransformer2DModel(**config)
    torch.set_default_dtype(before)
    pipeline = DigitsPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=PixelVae(model.config.in_channels // 4),
        text_encoder=WordTable(model.config.joint_attention_dim, max_tokens=words),
        transformer=model,
    )
    pipeline.save_pretrained(folder, max_shard_size=shard or None)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def plan_of(teacher: str, blocks: int, variants: Mapping[str, Sequence[Span]]) -> Plan:
    """The plan of these variants; nobody reads the text that leaves the last block, so no unit is trained on it."""
    spans = sorted({span for chosen in variants.values() for span in chosen})
    units = tuple(
        UnitPlan(name=_name(span), span=span, streams=("image",) if span[1] == blocks - 1 else ("image", "text"))
        for span in spans
    )
    names = {variant: tuple(_name(span) for span in chosen) for variant, chosen in variants.items()}
    return Plan(teacher=teacher, blocks=blocks, units=units, variants=names)


def _name(span: Span) -> str:
    return f"blocks_{span[0]:02d}_{span[1]:02d}"


def _write_images(folder: Path, work: Workload) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(SAMPLES):
        pixels = random.integers(0, 256, (work.side, work.side, CHANNELS), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        words = [f"word{random.integers(1000)}" for _ in range(work.words)]
        (folder / f"{number:03d}.txt").write_text(" ".join(words))


def _recipe(run: Path, work: Workload, variants: Sequence[str], teacher: Path, checkpointing: bool) -> dict[str, Any]:
    return {
        "run": str(run),
        "data": {
            "source": "{run}/images",
            "shards": "{run}/shards",
            "heldout": 0.0,
            "images": {"size": work.side},
        },
        "teacher": {"path": str(teacher), "precision": work.precision},
        "noise": {"caption_dropout": 0.0},  # every sample has the same number of tokens
        "plan": {"variants": dict.fromkeys(variants, 0.5)},
        "topology": {"stages": work.stages, "replicas": 1},
        "distill": {
            "steps": 1000,  # more than are timed
            "micro_batch": work.micro_batch,
            "micro_batches_per_step": work.micro_batches,
            "magnitude_weight": 0.0,
            "activation_checkpointing": checkpointing,
        },
    }
