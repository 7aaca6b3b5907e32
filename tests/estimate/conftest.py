"""Recipes of which nothing but the teacher's configurations exists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import make_recipe, write_config


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
