"""Prompt sets are drawn as stock diffusers draws them, on any number of ranks to the same bit, and never twice."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

import ppcl_ds
from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.drawing import Images, draw_sets
from ppcl_ds.evaluate.evaluate import check
from ppcl_ds.evaluate.painter import fits, needs_sharding
from ppcl_ds.export.consolidate import Form, consolidate
from ppcl_ds.recipe import Recipe, load_recipe
from tests.conftest import command
from tests.export.trained import pretend_trained
from tests.ranks import ROOT, environment, fresh, run_ranks

PROMPTS = ["a tiny two", "one", "a tiny zero"]
SMALL = {"steps": 2, "guidance": 2.0, "samples": 2, "batch_size": 2, "velocity_batches": 1}


@pytest.fixture
def ready(new_run: Callable[..., Path]) -> Callable[..., Path]:
    """`ready(family, key=value, ...)`: a recipe with two variants that are written, and prompts to draw."""

    def make(family: str = "qwen", **settings: Any) -> Path:
        path = new_run(family)
        prompts = path.parent / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS) + "\n")
        recipe = yaml.safe_load(path.read_text())
        recipe["evaluate"] = SMALL | {"sets": [{"name": "words", "prompts": str(prompts), "per_prompt": 2}]} | settings
        path.write_text(yaml.safe_dump(recipe))
        consolidate(pretend_trained(path, family), ["small", "medium"], Form())
        return path

    return make


def drawn(recipe: Recipe) -> dict[str, str]:
    """Every image that the set's scorer would see -> a digest of its pixels."""
    folder = recipe.run / "evaluate" / "words" / "images"
    return {
        str(path.relative_to(folder)): hashlib.sha256(np.asarray(Image.open(path)).tobytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


def draw(path: Path) -> dict[str, str]:
    """What this process alone draws."""
    recipe = load_recipe(path)
    checked = check(recipe)
    draw_sets(Images(recipe, checked.teacher, checked.drawn, checked.sets))
    return drawn(recipe)


def figures(recipe: Recipe) -> dict[str, Any]:
    """All that the report says, but for how long a forward took."""
    report = json.loads((recipe.run / "report.json").read_text())
    for row in report["models"]:
        del row["latency_ms"]
    return report


def files(recipe: Recipe) -> dict[Path, int]:
    """Every image that was drawn -> when."""
    return {path: path.stat().st_mtime_ns for path in (recipe.run / "evaluate" / "words" / "drawn").rglob("*.png")}


@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_images_are_those_of_the_stock_pipeline(ready: Callable[..., Path], family: str) -> None:
    path = ready(family)
    recipe = load_recipe(path)
    found = draw(path)
    assert len(found) == 3 * len(PROMPTS) * 2
    options: dict[str, Any] = {"num_inference_steps": 2, "true_cfg_scale": 2.0, "negative_prompt": " "}
    options |= {"height": 8, "width": 8} | dict(recipe.teacher.options)
    for model, folder in (("teacher", recipe.teacher.path), ("small", recipe.pruned("small").parent)):
        stock: Any = ppcl_ds.load_pipeline(folder, torch.float32)
        for n, k in ((0, 0), (2, 1)):
            expected = stock(PROMPTS[n], generator=torch.Generator().manual_seed(100 * n + k), **options).images[0]
            pixels = np.asarray(expected.convert("RGB")).tobytes()
            assert found[f"{model}/{n:05d}_{k:02d}.png"] == hashlib.sha256(pixels).hexdigest()
    settings = json.loads((recipe.run / "evaluate" / "words" / "small.json").read_text())
    assert settings["size"] == [8, 8]
    assert (settings["steps"], settings["guidance"], settings["negative prompt"]) == (2, 2.0, " ")
    assert settings["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert {"torch", "diffusers"} <= settings["versions"].keys()


@pytest.mark.parametrize(("world", "sharded"), [(2, False), (4, False), (2, True)])
def test_ranks_draw_what_one_process_draws(ready: Callable[..., Path], world: int, sharded: bool) -> None:
    path = ready("qwen", sharded=sharded or None)
    text = path.read_text()
    path.write_text(text.replace("sharded: true", "sharded: false"))
    recipe = load_recipe(path)
    command("evaluate", path)
    alone, said = drawn(recipe), figures(recipe)
    for file in files(recipe):
        file.unlink()
    path.write_text(text)
    run_ranks("ppcl_ds.cli", "evaluate", path, world=world)
    assert drawn(recipe) == alone
    assert figures(recipe) == said
    assert (recipe.run / "report.html").exists()


def test_what_is_drawn_is_not_drawn_again(ready: Callable[..., Path]) -> None:
    path = ready()
    recipe = load_recipe(path)
    first = draw(path)
    before = files(recipe)
    lost = sorted(before)[::7]
    for file in lost:
        file.unlink()
    printed = command("evaluate", path)
    assert f"draw: {len(before)} of {len(before)}" in printed
    after = files(recipe)
    assert {file for file in after if after[file] != before[file]} == set(lost)
    assert drawn(recipe) == first


def test_it_stops_on_request_and_goes_on(ready: Callable[..., Path]) -> None:
    path = ready()
    recipe = load_recipe(path)
    (recipe.run / "STOP").touch()
    assert "stops; what is drawn stays" in command("evaluate", path)
    assert (recipe.run / "evaluate" / "stopped").read_text() == "STOP\n"
    assert not (recipe.run / "evaluate" / "words" / "images").exists()
    (recipe.run / "STOP").unlink()
    draw(path)
    assert not (recipe.run / "evaluate" / "stopped").exists()
    assert len(drawn(recipe)) == 3 * len(PROMPTS) * 2


@pytest.mark.launcher
@pytest.mark.parametrize("world", [1, 2])
def test_killed_in_the_middle_it_goes_on(ready: Callable[..., Path], world: int) -> None:
    path = ready()
    recipe = load_recipe(path)
    started = fresh("ppcl_ds.cli", "evaluate", path)
    if world > 1:
        started = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone"]
        started += ["-m", "ppcl_ds.cli", "evaluate", str(path)]
    with subprocess.Popen(started, env=environment(), cwd=ROOT, start_new_session=True) as process:
        while len(files(recipe)) < 3 and process.poll() is None:
            time.sleep(0.01)
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
    before = files(recipe)
    assert 3 <= len(before) < 3 * len(PROMPTS) * 2
    found = draw(path)
    assert before.items() <= files(recipe).items()
    for file in files(recipe):
        file.unlink()
    assert draw(path) == found


def test_other_settings_and_other_weights_are_drawn_anew(ready: Callable[..., Path]) -> None:
    path = ready()
    recipe = load_recipe(path)
    first = draw(path)
    path.write_text(path.read_text().replace("guidance: 2.0", "guidance: 3.0"))
    other = draw(path)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)
    path.write_text(path.read_text().replace("guidance: 3.0", "guidance: 2.0"))
    count = len(files(recipe))
    assert draw(path) == first
    assert len(files(recipe)) == count
    weights = recipe.pruned("small") / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-400] + bytes(400))
    again = draw(path)
    changed = {name for name in first if again[name] != first[name]}
    assert changed
    assert {name.split("/")[0] for name in changed} == {"small"}


def test_a_full_disk_loses_nothing(ready: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = ready()
    recipe = load_recipe(path)
    written = 0
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        nonlocal written
        if "drawn" in str(target):
            written += 1
            if written > 4:
                raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"No space left on device.*what is drawn stays"):
        draw(path)
    assert len(files(recipe)) == 4
    assert not list((recipe.run / "evaluate").rglob("*.partial"))
    monkeypatch.undo()
    before = files(recipe)
    draw(path)
    assert before.items() <= files(recipe).items()
    assert len(files(recipe)) == 3 * len(PROMPTS) * 2


def test_a_teacher_is_spread_where_it_does_not_fit(ready: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(ready())
    teacher, gpu = check(recipe).teacher, torch.device("cuda")
    weights = 4 * sum(parameter.numel() for parameter in teacher.empty.parameters())
    for memory, spread in ((weights, True), (2 * weights, False)):
        about = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, about=about: about)
        assert needs_sharding(recipe, teacher, gpu) == spread
        assert fits(recipe, teacher, gpu, around=False) != spread
    assert not needs_sharding(recipe, teacher, torch.device("cpu"))


def test_a_set_that_cannot_be_read_ends_it_before_anything_is_loaded(ready: Callable[..., Path]) -> None:
    path = ready()
    (path.parent / "prompts.txt").write_text("one\n\ntwo\n")
    printed = command("evaluate", path, code=2)
    assert printed == f"error: {path.parent / 'prompts.txt'}, line 2 is blank; every line is a prompt, delete it\n"
    path.write_text(path.read_text().replace("per_prompt", "per_promt"))
    assert "unknown key 'evaluate.sets.0.per_promt'" in command("evaluate", path, code=2).replace(
        "key 'per", "key 'evaluate.sets.0.per"
    )
