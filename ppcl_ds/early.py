"""What can be known of a command before torch is imported, which takes seconds: names, folders, what is done."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ppcl_ds import launch, reporting
from ppcl_ds.atomic import atomic_write
from ppcl_ds.errors import UserError, missing
from ppcl_ds.recipe import Recipe, TrainingFolder, checkpoint_tag
from ppcl_ds.watch.lock import check_lock
from ppcl_ds.watch.mirror import check_package

UNDISTILLED, FINETUNED = "-undistilled", "-finetuned"
"""Endings of what a variant is called before its units are trained, and after it is fine-tuned as a whole."""

_UNREAD = ("run", "probe", "plan", "evaluate", "cluster", "wandb", "demo")
"""Sections of a recipe that no training reads."""


class Done(NamedTuple):
    """What a command returns that has changed a run.

    Attributes:
        command: as the run's page is to call it.
        shown: whether it has left anything that the page shows.
    """

    recipe: Recipe
    command: str
    shown: bool = True


def finetuned(variant: str) -> str:
    """What a variant is called after fine-tuning."""
    return variant + FINETUNED


def untuned(name: str) -> str:
    """The plan's variant, whether it has been fine-tuned or not."""
    return name.removesuffix(FINETUNED)


def say(what: str) -> None:
    """Print on stderr what the command is about to do, before it is silent for seconds."""
    if launch.is_first_rank():
        print(f"{what} ...", file=sys.stderr, flush=True)


def begin(recipe: Recipe, step: str, what: str) -> None:
    """Say what a step of the road is about to do, and keep its report in the run folder, or where its job has it."""
    say(f"{step}: {what}")
    if reporting.own.path is None:
        reporting.keep_in(reporting.of_step(recipe.run, step)).update()


def check_choice(option: str, value: str | None, known: Collection[str]) -> None:
    """Refuse a word that an option does not know.

    Raises:
        UserError: it is none of those known.
    """
    if value is not None and value not in known:
        raise UserError(f"{option}: '{value}' is not one of {', '.join(known)}")


def check_there(path: Path, what: str) -> None:
    """Refuse a path where nothing is.

    Raises:
        UserError: the message says what should be there.
    """
    if not path.exists():
        raise UserError(f"{what} {missing(path)}")


def variants_in(plan: Path) -> list[str] | None:
    """Names of the variants in a plan file; None where it cannot be read, which whoever reads all of it explains."""
    try:
        return [str(name) for name in yaml.safe_load(plan.read_bytes())["variants"]]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None


def check_variants(plan: Path, names: Collection[str]) -> None:
    """Refuse names that a plan file does not have.

    Raises:
        UserError: there is no plan, or no such variant in it.
    """
    if not plan.exists():
        raise UserError(f"plan {plan}: not found; make it with `ppcl plan`")
    known = variants_in(plan)
    if known is not None and (unknown := [name for name in names if untuned(name) not in known]):
        raise UserError(f"variant '{untuned(unknown[0])}' is not in the plan; it has: {', '.join(known)}")


def check_training(recipe: Recipe, variants: Collection[str]) -> None:
    """What is quickly told of a training: its teacher's folder, or that of the hub's id, its plan, its packages.

    Args:
        variants: that it is to train; none: the library.

    Raises:
        UserError: something is not there.
    """
    _ = recipe.teacher.folder
    check_variants(recipe.plan_file, variants)
    check_package(recipe)


def is_finished(recipe: Recipe, folder: TrainingFolder, steps: int, named: str) -> bool:
    """Whether a training has done its last step, with this recipe and plan; says so.

    What makes that doubtful, such as another plan or changed settings, is for the training's own check.

    Args:
        named: the recipe, as it is typed.

    Raises:
        UserError: somebody trains in the folder now.
    """
    if not launch.is_rank():
        check_lock(folder.path)
    try:
        before = json.loads(folder.recipe.read_bytes())
        same = folder.finished(steps) and _holds_plan(folder, recipe.plan_file)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return False
    if not (same and _read(before) == _read(recipe.model_dump(mode="json"))):
        return False
    if launch.is_first_rank():
        print(f"{folder.command}: {steps} of {steps} steps are done, in {folder.checkpoints / checkpoint_tag(steps)}")
        print(f"next: ppcl consolidate {named}")
        reporting.keep_in(folder.progress)
        known = reporting.read_report(folder.progress).model_dump(include={"what", "loss", "samples_per_second"})
        reporting.own.update(**known, state="done", step=steps, total=steps)
    return True


def _holds_plan(folder: TrainingFolder, path: Path) -> bool:
    """Whether a training's newest checkpoint is of a plan: that of its start, or of a library, all units of it."""
    if folder.command == "finetune":
        return folder.plan.read_bytes() == path.read_bytes()
    units, trained = (yaml.safe_load(plan.read_bytes())["units"] for plan in (path, folder.plan))
    newest = folder.checkpoints / (folder.checkpoints / "latest").read_text().strip()
    held = json.loads((newest / "checkpoint.json").read_bytes())["units"]
    return all(unit in trained and unit["name"] in held for unit in units)


def _read(recipe: Any) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in _UNREAD}


class PlanMemory:
    """Remembers that a plan file is in order for its teacher, so that it need not be checked again.

    Attributes:
        path: of the file that remembers.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.path = recipe, recipe.run / "plan" / "in_order"

    @property
    def known(self) -> bool:
        try:
            return self.path.read_text() == self._digest()
        except OSError:
            return False

    def remember(self) -> None:
        """The plan file has been checked, and nothing is wrong with it."""
        atomic_write(self.path, self._digest())

    def _digest(self) -> str:
        """Of everything that the check hangs on."""
        teacher = self.recipe.teacher
        folders = (teacher.folder / teacher.component, teacher.folder)
        files = (self.recipe.plan_file, next(filter(Path.is_dir, folders), teacher.folder) / "config.json")
        words = [json.dumps(teacher.model_dump(mode="json")), *(version(name) for name in ("ppcl-ds", "diffusers"))]
        parts = [*(file.read_bytes() for file in files), *(word.encode() for word in words)]
        return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
