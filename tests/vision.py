"""torchvision for the tests: found where `make test-families` puts it, and importable beside any build of torch.

Its wheel holds operators compiled for one build of torch; beside another it does not even import. The stock pipelines
of the tests call none of these operators, so there it is enough that they are declared.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "families"
"""Packages that a few stock pipelines import. They are large, so `.venv` itself does without."""

_DECLARED = ("nms", "qnms")
"""The operators that torchvision looks up while it is imported."""


def make_importable() -> None:
    """Before anything asks whether torchvision is there."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        for name in _DECLARED:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
