"""Shrink a diffusion transformer into a family of smaller ones, on DeepSpeed (PPCL, arXiv 2511.16156)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppcl_ds.export.load import load_model, load_pipeline

_LOADERS = ("load_model", "load_pipeline")
__all__ = ["load_model", "load_pipeline", "shipped"]


def shipped(name: str) -> Path:
    """A recipe or DeepSpeed file that ships with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).exists() else package.parent / name


def __getattr__(name: str) -> Any:
    """The loaders import torch and diffusers, which takes seconds; so they are imported when they are asked for."""
    if name in _LOADERS:
        from ppcl_ds.export import load

        return getattr(load, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
