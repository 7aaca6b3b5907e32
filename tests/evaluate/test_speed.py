"""`ppcl evaluate --speed`: teacher and variants are timed in every way, and what cannot be timed says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ppcl_ds.evaluate import speed
from ppcl_ds.evaluate.evaluate import check
from ppcl_ds.evaluate.speed import Speed, gains, measure_speed, read_speed
from ppcl_ds.export.consolidate import Form, consolidate
from ppcl_ds.recipe import load_recipe
from tests.export.trained import pretend_trained


def test_every_model_is_timed_at_every_size_and_batch(
    new_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = new_run("qwen")
    (path.parent / "prompts.txt").write_text("one\n")
    recipe = yaml.safe_load(path.read_text())
    recipe["evaluate"] = {"steps": 1, "sets": [{"name": "a", "prompts": str(path.parent / "prompts.txt"), "size": 16}]}
    path.write_text(yaml.safe_dump(recipe))
    consolidate(pretend_trained(path, "qwen"), ["small", "medium"], Form())
    checked = check(load_recipe(path))

    def refuses(painter: object) -> None:
        raise RuntimeError("knows no such pipeline")

    monkeypatch.setattr(speed, "ways", lambda: {"plain": (speed._plain,), "cached": (refuses,)})
    rows = measure_speed(checked.recipe, checked.teacher, checked.drawn)
    expected = {
        (model, way, size, batch)
        for model in ("teacher", "small", "medium")
        for way in ("plain", "cached")
        for size in (8, 16)
        for batch in (1, 2, 4)
    }
    assert {(row.model, row.way, row.size, row.batch) for row in rows} == expected
    for row in rows:
        assert (row.seconds is None) == (row.way == "cached")
        assert row.fault == ("knows no such pipeline" if row.way == "cached" else "")
    assert read_speed(checked.recipe.run) == rows
    assert len(json.loads((checked.recipe.run / "speed.json").read_text())) == len(expected)


def test_gains_are_over_the_plain_teacher_of_the_same_size_and_batch() -> None:
    rows = [
        Speed(model="teacher", way="plain", size=8, batch=1, seconds=4.0),
        Speed(model="teacher", way="cached", size=8, batch=1, seconds=2.0),
        Speed(model="small", way="cached", size=8, batch=1, seconds=1.0),
        Speed(model="small", way="plain", size=8, batch=2, seconds=1.0),
        Speed(model="small", way="compiled", size=8, batch=1, fault="out of memory"),
    ]
    assert gains(rows) == {
        ("teacher", "plain", 8, 1): 1.0,
        ("teacher", "cached", 8, 1): 2.0,
        ("small", "cached", 8, 1): 4.0,
    }
