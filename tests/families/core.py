"""Which families the ordinary suite runs; `make test-families` runs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

CORE = {
    "ace_step",
    "chroma",
    "cogvideox",
    "flux",
    "flux2",
    "flux_kontext",
    "hunyuan_video15",
    "ltx",
    "nucleus_moe",
    "pixart",
    "qwen_image",
    "sana",
    "sd3",
    "wan",
    "wan22",
    "wan_vace",
    "z_image",
}
"""One of each kind: what most people have, and what is special in a way of its own."""


def cases(names: Iterable[str]) -> list[Any]:
    """Parameters of a test over families."""
    return [pytest.param(name, marks=() if name in CORE else pytest.mark.families) for name in names]
