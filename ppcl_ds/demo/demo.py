"""`ppcl demo`: the whole road on a testbed, each step the public command that a cluster user would type."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ppcl_ds.demo.teacher import train_teacher
from ppcl_ds.demo.testbeds import TESTBEDS, write_captions, write_images
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.recipe_file import SET, as_one_file
from ppcl_ds.steps import Step, steps

_DATA, _TEACHER = "write images with captions, or captions alone", "train a teacher from scratch"
"""What the demo does beside the road: what others bring."""


def demo(path: Path, recipe: Recipe, fresh: bool, changes: Sequence[str] = ()) -> None:
    """Walk the road; what is done already is not repeated.

    Args:
        changes: of the recipe, see `load_recipe`; every step is told of them.

    Raises:
        UserError: the run folder belongs to another recipe.
    """
    if recipe.demo is None:
        raise UserError(f"recipe {path}: no section 'demo', which says how to train the demo's teacher")
    used = recipe.run / "recipe.yaml"
    for name, inside in (("teacher.path", recipe.teacher.path), ("data.shards", recipe.data.shards)):
        if not inside.resolve().is_relative_to(recipe.run.resolve()):
            raise UserError(f"recipe {path}: {name} lies outside the run folder; the demo makes and replaces it")
    if fresh and recipe.run.exists():
        if not used.exists():
            raise UserError(f"{recipe.run} is not a demo's run folder (no recipe.yaml in it); remove it yourself")
        shutil.rmtree(recipe.run)
    content = as_one_file(path, changes)
    if used.exists() and used.read_text() != content:
        raise UserError(f"{recipe.run} was made with another recipe; start over with --fresh (make demo FRESH=1)")
    recipe.run.mkdir(parents=True, exist_ok=True)
    used.write_text(content)
    # At this size a second thread gains little, and on a machine that does anything else it costs a great deal.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    testbed = TESTBEDS[recipe.demo.data]
    testbed.fetch()
    road = _road(recipe)
    told = [word for change in changes for word in (SET, change)]
    for number, step in enumerate(road):
        lines = [line + told for line in _lines(step, str(path))]
        title = f"[{number + 1}/{len(road)}] " + (" && ".join(map(" ".join, lines)) or step.name)
        if step.done():
            print(f"{title} (done before)", flush=True)
            continue
        print(f"\n{title}", flush=True)
        for later in road[number + 1 :]:
            for made in later.makes:
                shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
        if step.name == _DATA:
            source = Path(recipe.data.sources[0])
            (write_captions if source.suffix == ".txt" else write_images)(testbed, source)
        elif step.name == _TEACHER:
            train_teacher(recipe)
        for line in lines:
            _run(*line)
    print(f"\nLook at {recipe.run}/samples.png and {recipe.run}/report.html; the models are in {recipe.run}/pruned/.")


def _road(recipe: Recipe) -> list[Step]:
    """The road, and what the demo does beside it."""
    shard, encode, *rest = steps(recipe, list(recipe.plan.variants))
    data = Step(_DATA, (Path(recipe.data.sources[0]),), shard.done)
    teacher = Step(_TEACHER, (recipe.teacher.path,), (recipe.teacher.path / "model_index.json").exists)
    return [data, shard, teacher, encode, *rest]


def _lines(step: Step, recipe: str) -> list[list[str]]:
    """The command lines that do a step of the road."""
    if step.name in (_DATA, _TEACHER):
        return []
    line = ["ppcl-data" if step.name in ("shard", "encode") else "ppcl", step.name, recipe]
    return [[*line, "--variant", variant] for variant in step.variants] if step.name == "finetune" else [line]


def _run(program: str, *arguments: str) -> None:
    module = {"ppcl": "ppcl_ds.cli", "ppcl-data": "data_tools.cli"}[program]
    with subprocess.Popen([sys.executable, "-m", module, *arguments]) as step:
        try:
            code = step.wait()
        except BaseException:  # stopped: the step stops its own processes, then we go
            step.terminate()
            raise
    if code:
        sys.exit(code)
