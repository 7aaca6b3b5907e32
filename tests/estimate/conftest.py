"""Teachers of which nothing but `config.json` exists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppcl_ds.teacher.teacher import Teacher
from tests.conftest import TEACHERS, make_recipe

QWEN_IMAGE: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
"""The published Qwen-Image transformer."""

Configured = Callable[..., Teacher]


def write_config(folder: Path, family: str, **changes: Any) -> Path:
    """A teacher folder with `config.json` alone."""
    class_name, config = TEACHERS[family]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name} | config | changes))
    return folder


@pytest.fixture
def configured(tmp_path: Path) -> Configured:
    """`configured(family, key=value, ...)`: a teacher without weights."""

    def make(family: str, **changes: Any) -> Teacher:
        return Teacher(write_config(tmp_path / f"{family} {len(list(tmp_path.iterdir()))}", family, **changes), False)

    return make


@pytest.fixture
def unprepared(tmp_path: Path) -> Callable[..., Path]:
    """`unprepared(family, config={...}, section={...}, ...)`: a recipe with no data, no weights, no plan."""

    def make(family: str, config: dict[str, Any] | None = None, **changes: dict[str, Any]) -> Path:
        run = tmp_path / "run"
        write_config(run / "teacher", family, **(config or {}))
        recipe = make_recipe(family, run)
        for section, values in changes.items():
            recipe[section] = recipe.get(section, {}) | values
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return make
