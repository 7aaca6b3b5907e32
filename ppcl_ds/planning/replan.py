"""`ppcl plan --from-run`: units that were trained a little are measured, and variants are chosen anew among them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch.distributed as dist

from ppcl_ds import launch, launcher
from ppcl_ds.atomic import atomic_write
from ppcl_ds.data.stream import check_data
from ppcl_ds.errors import UserError
from ppcl_ds.planning.budget import Budget
from ppcl_ds.planning.choose import choose_again, choose_sets, kept_variants
from ppcl_ds.planning.error_model import MEASURES, fitted
from ppcl_ds.planning.growth import exponents
from ppcl_ds.planning.planner import budget_for, write
from ppcl_ds.planning.swaps import Swaps, load_swaps
from ppcl_ds.recipe import Recipe, teacher_config
from ppcl_ds.teacher.comparison import measures_of
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import Checkpoint, newest_checkpoint
from ppcl_ds.units.plan import load_plan, refuse_edited
from ppcl_ds.watch.tensorboard import read_scalars, unit_losses


class Replan:
    """A recipe's variants and the run whose library they are chosen from, checked before a process starts.

    Args:
        run: folder of the run that has trained the library; the recipe's own, or another one of the same teacher.

    Attributes:
        library: the units of the run's newest checkpoint.

    Raises:
        UserError: one line that says what is wrong.
    """

    def __init__(self, recipe: Recipe, run: Path) -> None:
        self.recipe = recipe
        refuse_edited(recipe.plan_file)  # now, not after an hour of measuring
        self.teacher = open_teacher(recipe)
        other = recipe.model_copy(update={"run": run})
        self.board = other.distillation.board
        self.checkpoint: Checkpoint = newest_checkpoint(other.distillation.checkpoints)
        trained = load_plan(other.distillation.plan, self.teacher)
        units = tuple(unit for unit in trained.units if unit.name in self.checkpoint.contents.units)
        self.library = trained.model_copy(update={"units": units, "variants": {}})
        if not recipe.plan.variants:
            raise UserError("plan.variants is empty: name the variants to choose, with the share that each gives up")
        self._check_objective()
        launch.check_world(recipe.topology.world)
        check_data(recipe.data, train=False)
        teacher_config(recipe)

    def _check_objective(self) -> None:
        """Whether what the recipe's objective is made of can be measured."""
        objective, call = self.recipe.plan.objective, self.teacher.call
        missing = [measure for measure in MEASURES[objective] if measure not in measures_of(self.recipe, call)]
        if not missing:
            return
        if objective == "branches":
            raise UserError(
                "plan.objective: branches: at this recipe's evaluate.guidance the transformer is asked once a step, so "
                "there are no two branches; set evaluate.guidance above 1, or plan.objective: pictures"
            )
        if objective == "draw":
            raise UserError(
                "plan.objective: draw: the pipeline draws with two transformers, and one of them is here; set "
                "plan.objective: velocity"
            )
        launcher.say_once("plan.objective: the pipeline draws with two transformers: the velocity decides alone")

    @property
    def measured(self) -> Swaps | None:
        """What was measured of this very checkpoint, on these very samples, before."""
        swaps = load_swaps(self.recipe.swaps_file)
        return swaps if swaps and (swaps.checkpoint, swaps.units) == (self._name, self.library.units) else None

    @property
    def _name(self) -> str:
        """The checkpoint, and a digest of all else that a measurement depends on."""
        recipe, folder = self.recipe, self.checkpoint.folder.resolve()
        settings = [recipe.seed, recipe.data, recipe.noise, recipe.evaluate, recipe.teacher, recipe.plan.prompts]
        content = [str(each) for each in settings] + [str((folder / "checkpoint.json").stat().st_mtime_ns)]
        return f"{folder} {hashlib.sha256(repr(content).encode()).hexdigest()[:16]}"

    def measure(self) -> None:
        """Measure the library; every rank must call this, rank 0 then chooses."""
        device = launch.join(deterministic=self.recipe.deterministic)
        from ppcl_ds.planning.measure import SwapBench, measure_swaps

        bench = SwapBench(self.recipe, self.teacher, self.library, self.checkpoint, device)
        trained = self.checkpoint.contents.step
        falls = exponents(self.library.units, self._curves()) if launch.is_first_rank() else []
        swaps = measure_swaps(bench, self._name, lambda swaps: self._choose(swaps).values(), trained, falls)
        if dist.get_rank() == 0:  # before anything is chosen: what was measured is kept, whatever comes of it
            atomic_write(self.recipe.swaps_file, swaps.model_dump_json(indent=1))
        launch.leave()
        self.write(swaps)

    def write(self, swaps: Swaps) -> None:
        """Choose every variant and write the plan, on one rank."""
        if not launch.is_first_rank():
            return
        budget = self._budget(swaps)
        plan = choose_again(self.recipe.plan, swaps, self.library, budget, self.recipe.distill.steps, self._others())
        write(self.recipe, plan, self.teacher, fitted(swaps, self.recipe.plan.objective), budget, swaps)

    def _curves(self) -> dict[str, list[tuple[int, float]]]:
        """The losses of the units as they were trained."""
        return unit_losses(read_scalars(self.board)) if self.board.exists() else {}

    def _choose(self, swaps: Swaps) -> dict[str, tuple[str, ...]]:
        section = self.recipe.plan
        kept = kept_variants(section, self.library, self._others())
        return choose_sets(section, swaps, self._budget(swaps), self.recipe.distill.steps, kept)

    def _others(self) -> dict[str, tuple[str, ...]]:
        """The variants of the plan as it was."""
        now = self.recipe.plan_file
        return load_plan(now, self.teacher).variants if now.exists() else {}

    def _budget(self, swaps: Swaps) -> Budget:
        return budget_for(self.recipe, self.library, self.teacher, swaps)
