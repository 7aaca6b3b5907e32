"""Shrink a diffusion transformer into a family of smaller ones, on DeepSpeed (PPCL, arXiv 2511.16156)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppcl_ds.export.load import load_model, load_pipeline

__all__ = ["load_model", "load_pipeline"]


def __getattr__(name: str) -> Any:
    """The loaders import torch and diffusers, which takes seconds; so they are imported when they are asked for."""
    if name in __all__:
        from ppcl_ds.export import load

        return getattr(load, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
