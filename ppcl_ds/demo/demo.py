"""`ppcl demo`: the whole road on the digits, each step the public command that a cluster user would type."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ppcl_ds.demo.digits import write_images
from ppcl_ds.demo.teacher import train_teacher
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.units.plan import finetuned


@dataclass(frozen=True)
class Step:
    """One step of the road.

    Attributes:
        title: what the user reads.
        action: does it; a list is a command line.
        makes: what it leaves in the run folder; removed when an earlier step has run anew.
        done: whether it needs no running.
    """

    title: str
    action: Callable[[], None] | list[str]
    makes: list[Path]
    done: Callable[[], bool]


def demo(path: Path, recipe: Recipe, fresh: bool) -> None:
    """Walk the road; what is done already is not repeated.

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
    if used.exists() and used.read_text() != path.read_text():
        raise UserError(f"{recipe.run} was made with another recipe; start over with --fresh (make demo FRESH=1)")
    recipe.run.mkdir(parents=True, exist_ok=True)
    used.write_text(path.read_text())
    # At this size a second thread gains little, and on a machine that does anything else it costs a great deal.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    steps = _steps(path, recipe)
    for number, step in enumerate(steps):
        if step.done():
            print(f"[{number + 1}/{len(steps)}] {step.title} (done before)", flush=True)
            continue
        print(f"\n[{number + 1}/{len(steps)}] {step.title}", flush=True)
        for later in steps[number + 1 :]:
            for made in later.makes:
                shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
        _run(step.action)
    print(f"\nLook at {recipe.run}/samples.png and {recipe.run}/report.html; the models are in {recipe.run}/pruned/.")


def _run(action: Callable[[], None] | list[str]) -> None:
    if callable(action):
        action()
        return
    program, *arguments = action
    module = {"ppcl": "ppcl_ds.cli", "ppcl-data": "data_tools.cli"}[program]
    with subprocess.Popen([sys.executable, "-m", module, *arguments]) as step:
        try:
            code = step.wait()
        except BaseException:  # stopped: the step stops its own processes, then we go
            step.terminate()
            raise
    if code:
        sys.exit(code)


def _command(arguments: list[str], makes: list[Path], done: Callable[[], bool]) -> Step:
    return Step(" ".join(arguments), arguments, makes, done)


def _steps(path: Path, recipe: Recipe) -> list[Step]:
    def all_exist(*paths: Path) -> Callable[[], bool]:
        return lambda: all(p.exists() for p in paths)

    run, file = recipe.run, str(path)
    raw, encoded = recipe.data.shards / "raw", recipe.data.shards / "encoded"
    report = [run / "samples.png", run / "report.json", run / "report.html"]
    tuned = recipe.finetune.variants if recipe.finetune else ()
    names = [*recipe.plan.variants, *map(finetuned, tuned)]
    pruned = [recipe.pruned(name) / "config.json" for name in names]
    return [
        Step(
            "write the digits as images with captions",
            lambda: write_images(Path(recipe.data.source)),
            [Path(recipe.data.source)],
            all_exist(raw / "index.json"),
        ),
        _command(["ppcl-data", "shard", file], [raw], all_exist(raw / "index.json")),
        _command(["ppcl-data", "encode", file], [encoded], all_exist(encoded / "index.json")),
        Step(
            "train a teacher from scratch",
            lambda: train_teacher(recipe),
            [recipe.teacher.path],
            all_exist(recipe.teacher.path / "config.json"),
        ),
        _command(["ppcl", "probe", file], [recipe.probe_folder], all_exist(recipe.probe_folder / "report.json")),
        _command(["ppcl", "plan", file], [recipe.plan_file], all_exist(recipe.plan_file)),
        _command(["ppcl", "distill", file], [run / "distill"], lambda: recipe.distilled),
        *(
            _command(
                ["ppcl", "finetune", file, "--variant", variant],
                [recipe.finetuning(variant).path],
                partial(recipe.finetuning(variant).finished, recipe.tuning.steps),
            )
            for variant in tuned
        ),
        _command(["ppcl", "consolidate", file], [run / "pruned"], all_exist(*pruned)),
        _command(["ppcl", "evaluate", file], report, all_exist(*report)),
    ]
