"""Tiny whole stock pipelines, one a family: a file of this package adds families, and every test runs over all."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch

from tests.families.teachers import shake


@dataclass(frozen=True)
class TinyPipeline:
    """A stock pipeline of random weights that draws a picture of a few latents, or a clip, on the CPU."""

    name: str
    make: Callable[[], Any]
    """A whole `DiffusionPipeline` in float32: transformer, VAE, text encoders, tokenizers made here, scheduler."""
    call: Mapping[str, Any]
    """Arguments of a tiny draw without guidance, where the family can; neither latents nor steps."""
    image: bool = False
    """Whether the pipeline edits: then `call` has the source as `image`."""
    needs: str = ""
    """A package that upstream imports and that may not be installed."""


PIPELINES: dict[str, TinyPipeline] = {}


def family(
    name: str, call: Mapping[str, Any], image: bool = False, needs: str = ""
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Enters what a function makes under this name, its transformers shaken as teachers are."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        if name in PIPELINES:
            raise ValueError(f"two pipelines are called {name}")

        def seeded() -> Any:
            torch.manual_seed(0)
            pipeline = make()
            for part_name, part in pipeline.components.items():
                if isinstance(part, torch.nn.Module):
                    part.eval().requires_grad_(False)
                    if "transformer" in part_name:
                        shake(part)
            return pipeline

        classes = [used for used in make.__code__.co_names if used.endswith("Pipeline")]
        if all(hasattr(diffusers, used) for used in classes):  # a diffusers that is older than a family lacks them
            PIPELINES[name] = TinyPipeline(name, seeded, call, image, needs)
        return make

    return register


def make_pipeline(name: str, folder: Path) -> None:
    """Save a whole pipeline as its users would find it."""
    PIPELINES[name].make().save_pretrained(folder)


for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
