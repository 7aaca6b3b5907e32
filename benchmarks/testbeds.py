"""Libraries of units for a testbed's teacher, trained and judged: what the programs on quality share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
import yaml
from torch import nn

from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.figures import Bench, ModelFigures
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.recipe_file import read_recipe_file
from ppcl_ds.shipped import shipped
from ppcl_ds.teacher.encoding import Decoder
from ppcl_ds.teacher.heldout import mean_squared
from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.plan import Plan, load_plan
from ppcl_ds.units.variant import assembled

SIZES = {"-33 %": 0.33, "-50 %": 0.5, "-75 %": 0.75}
"""Variants by the share of block parameters that they give up."""

TITLES = {
    "velocity_mse": "velocity MSE",
    "guided_mse": "guided velocity MSE",
    "short_mse": "4-step MSE",
    "frechet": "Fréchet",
    "accuracy": "accuracy",
    "sample_mse": "sample MSE",
}
"""Figures of a model, and what tables call them."""

COLUMNS = ("velocity_mse", "frechet", "accuracy", "sample_mse")
"""Those that most tables show."""

SCOUTED = 1 / 6
"""Share of the unit-steps that a planned library spends on candidates."""

PROMPTS = 64
"""That the planner draws with every unit and set of units."""

BATCH = {"digits": 64, "emoji": 32}
"""Samples in an optimizer step, by testbed; the emoji's teacher takes ten times as long for one."""

JUDGED = {"digits": 500, "emoji": 150}
"""Images that each model draws, by testbed."""


Testbed = Annotated[str, typer.Option(help="Which teacher: the name of a demo's recipe, `digits` or `emoji`.")]


def write_recipe(run: Path, seed: int, steps: int, testbed: str = "digits", teacher: int = 0, **plan: Any) -> Path:
    """A recipe for the demo's teacher and shards that trains one library in one process; returns its file.

    Args:
        testbed: name of the recipe that made teacher and shards.
        teacher: 0 is the demo's own; others are those of `benchmarks.spread`, by their seeds.
        plan: what section `plan` says beside the variants.

    Raises:
        UserError: the demo has not been made.
    """
    recipe = read_recipe_file(shipped(f"recipes/{testbed}.yaml")).raw
    demo, made_by = Path(recipe["run"]), f"ppcl demo recipes/{testbed}.yaml"
    if teacher:
        demo, made_by = demo.with_name(f"spread-{teacher}"), "python -m benchmarks.spread"
    for needed in (demo / "teacher" / "model_index.json", demo / "probe" / "report.json", demo / "shards" / "encoded"):
        if not needed.exists():
            raise UserError(f"{needed} is missing; run `{made_by}` first")
    recipe |= {"run": str(run), "seed": seed, "demo": None, "finetune": None, "topology": {"stages": 1}}
    recipe["teacher"]["path"] = str(demo / "teacher")
    recipe["data"] |= {"source": str(demo / "images"), "shards": str(demo / "shards"), "workers": 0}
    recipe["plan"] = {"variants": SIZES, "prompts": PROMPTS, **plan}
    recipe["distill"] |= {"steps": steps, "micro_batch": BATCH[testbed], "micro_batches_per_step": 1, "sample_every": 0}
    recipe["distill"] |= {"log_every": 5, "checkpoint_every": 10**6}  # how errors fall is read from few steps
    recipe["evaluate"]["samples"] = JUDGED[testbed]
    (run / "probe").mkdir(parents=True, exist_ok=True)
    shutil.copy(demo / "probe" / "report.json", run / "probe" / "report.json")
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def ppcl(*arguments: str | Path) -> None:
    """Run a `ppcl` command in a process of its own, on one CPU thread.

    Raises:
        RuntimeError: it failed; the message is what it printed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "ppcl_ds.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        raise RuntimeError(f"ppcl {' '.join(map(str, arguments))}:\n{done.stdout}")


def units_of(path: Path) -> int:
    """Units of a plan; libraries are trained in threads, where no empty model may be built (it is done globally)."""
    return len(yaml.safe_load(load_recipe(path).plan_file.read_text())["units"])


def train_planned(run: Path, seed: int, budget: int, **options: Any) -> Path:
    """Train candidates a little, plan anew, train what is left; returns the recipe file.

    Args:
        budget: in unit-steps, of which each is one optimizer step of one unit.
        options: what section `plan` of the recipe says, and which testbed it is.
    """
    path = write_recipe(run, seed, 1, **options)
    ppcl("plan", path)
    scouts = units_of(path)
    scouted = round(budget * SCOUTED / scouts)
    # How many units will be left, and so how long they can be trained, is known only when the scouts are measured. The
    # learning rate follows the last step, which is taken for that of a library a third as large.
    steps = scouted + (budget - scouted * scouts) * 3 // scouts
    write_recipe(run, seed, steps, **options)
    ppcl("distill", path, "--until", str(scouted))
    ppcl("plan", path, "--from-run", run)
    steps = scouted + (budget - scouted * scouts) // units_of(path)
    write_recipe(run, seed, steps, **options)
    ppcl("distill", path)
    return path


class Library:
    """A library of units: its plan, and once it is trained, variants of it as stock models."""

    def __init__(self, path: Path) -> None:
        self.recipe: Recipe = load_recipe(path)
        self.teacher = open_teacher(self.recipe)

    @property
    def plan(self) -> Plan:
        """The plan as it is now."""
        return load_plan(self.recipe.plan_file, self.teacher)

    @property
    def trained(self) -> Plan:
        """The plan that training began with."""
        return load_plan(self.recipe.distillation.plan, self.teacher)

    def model(self, names: tuple[str, ...]) -> nn.Module:
        """The teacher with these units plugged in, without retraining."""
        plan = self.trained.model_copy(update={"variants": {"set": names}})
        checkpoint = newest_checkpoint(self.recipe.distillation.checkpoints)
        return assembled(self.teacher, plan, "set", lambda unit: checkpoint.unit(unit.name))


class Judge:
    """The demo's own figures, on the same samples and noise for every model, whatever it was trained on.

    Args:
        quick: draws a tenth of the images, whose figures say little.
    """

    def __init__(self, recipe: Recipe, quick: bool = False) -> None:
        drawn = recipe.evaluate.model_copy(update={"samples": recipe.evaluate.samples // (10 if quick else 1)})
        recipe = recipe.model_copy(update={"seed": 0, "evaluate": drawn})
        teacher = open_teacher(recipe)
        self.dtype = DTYPES[recipe.teacher.precision]
        self.bench = Bench(recipe, teacher, torch.device("cpu"))
        self.decode = Decoder(recipe.teacher.path)
        assert teacher.files.model_class is not None
        self.teacher = self.of(teacher.files.model_class.from_pretrained(teacher.files.folder))

    def of(self, model: nn.Module) -> ModelFigures:
        """All figures of a model."""
        return self.bench.measure("", model, self.decode)[0]

    def velocity_mse(self, model: nn.Module) -> float:
        """The velocity error alone, which is quicker."""
        return mean_squared(self.bench.heldout.velocities(model), self.bench.teacher_velocities)


def folder_of(name: str, testbed: str, quick: bool) -> Path:
    """Where a program keeps its runs."""
    return Path("runs", "-".join([name, *([] if testbed == "digits" else [testbed]), *(["quick"] if quick else [])]))


def judged(path: Path, judge: Judge) -> dict[str, ModelFigures]:
    """Figures of every size, from the run folder if they were taken before."""
    file = path.with_name("figures.json")
    if not file.exists():
        library = Library(path)
        models = {size: judge.of(library.model(names)) for size, names in library.plan.variants.items()}
        file.write_text(json.dumps({size: figures.model_dump() for size, figures in models.items()}, indent=1))
    return {size: ModelFigures.model_validate(each) for size, each in json.loads(file.read_text()).items()}


def cell(values: list[float]) -> str:
    """Mean and spread over seeds."""
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.3g}{spread}"
