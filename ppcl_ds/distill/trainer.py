"""The distillation run: one library of units, all of it trained at once against the frozen teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ppcl_ds.console import track
from ppcl_ds.distill.least_squares import calibrate
from ppcl_ds.distill.library import Library
from ppcl_ds.distill.preview import look
from ppcl_ds.distill.replay import Ring
from ppcl_ds.distill.start import open_earlier, start_depth_units
from ppcl_ds.recipe import Recipe, read_deepspeed_file
from ppcl_ds.teacher.noising import NoisyBatch, level_weights
from ppcl_ds.teacher.teacher import Teacher, read_teacher, text_mask
from ppcl_ds.teacher.trajectories import TrajectoryStream
from ppcl_ds.training.delivery import Deliveries
from ppcl_ds.training.engine import StudentsEngine
from ppcl_ds.training.flops import measure_work
from ppcl_ds.training.log import print_units
from ppcl_ds.training.trainer import Training
from ppcl_ds.units.kinds import batches_of, taps_of
from ppcl_ds.units.plan import Plan
from ppcl_ds.units.unit import UnitBatch


class Trainer(Training):
    """A distillation on this rank.

    Args:
        recipe: the run.
        plan: units and variants, already checked against the teacher.
    """

    def __init__(self, recipe: Recipe, plan: Plan, teacher: Teacher) -> None:
        super().__init__(recipe, recipe.distill, recipe.distillation, plan, teacher, "distill")

    def build(self) -> tuple[StudentsEngine, list[list[str]]]:
        recipe, settings = self.recipe, self.recipe.distill
        wanted = taps_of(self.plan, self.teacher.anatomy)
        self.wanted = replace(wanted, to_the_end=wanted.to_the_end or settings.trajectories is not None)
        self.work = measure_work(self.teacher, self.plan, self.sample_size(), settings.trajectories)
        table = torch.tensor(sorted(settings.level_weights.items()), dtype=torch.float32, device=self.device)
        self.levels = (table[:, 0].contiguous(), table[:, 1].contiguous()) if len(table) else None
        self.ring = Ring(settings.replay, recipe.seed, self.device)
        self.library = Library(
            self.plan,
            self.teacher,
            costs=self.work.units,
            stages=recipe.topology.stages,
            dtype=self.dtype,
            magnitude_weight=settings.magnitude_weight,
            branch_weight=settings.branch_weight,
            checkpointing=settings.activation_checkpointing,
            compiles=settings.compile,
        )
        students = read_deepspeed_file(recipe.deepspeed.students)
        engine = StudentsEngine(self.library, students, settings, recipe.teacher.precision)
        return engine, self.library.stage_units

    def readings(self, step: int) -> range:
        return self.ring.readings(step, self.settings.steps)

    def read_teacher(self, batch: NoisyBatch) -> dict[str, UnitBatch]:
        """One teacher forward, as far as units need it; of trajectories, as far as they need it."""
        capture = read_teacher(self.sharded, self.teacher, batch, self.wanted)
        self.advance(batch, capture.output)
        found = batches_of(capture, text_mask(batch.arguments, capture), self.plan, self.teacher.anatomy)
        weights = level_weights(batch.places, self.levels) if self.levels else None
        twins = batch.twins if self.paired else None
        return {name: replace(unit, weights=weights, twins=twins) for name, unit in found.items()}

    @property
    def paired(self) -> bool:
        return self.recipe.distill.branch_weight > 0

    @property
    def kept_pictures(self) -> int:
        return self.recipe.distill.keep_pictures

    @property
    def kept(self) -> int:
        replay = self.recipe.distill.replay
        return replay.ring if replay.uses > 1 else 1

    @property
    def together(self) -> bool:
        return self.recipe.distill.replay.uses > 1

    def step(self, batches: Deliveries) -> None:
        with self.timer.phase("students"):
            for arrived in self.ring.members(self.engine.global_steps, partial(self.arrivals, batches)):
                for layer in self.library.layers:  # backward follows forward: one unit's activations in memory
                    self.engine.accumulate(layer.loss(arrived[layer.name]))
            self.engine.finish_step()

    def train(self, until: int | None = None) -> dict[str, float]:
        """See `Training.train`; prints a table of the units at its end."""
        newest = super().train(until)
        print_units(self.plan, newest)
        return newest

    def prepare(self, done: int) -> None:
        """Start the units, and free what they were calibrated by."""
        if not done:
            self._start()
        for layer in self.library.layers:
            layer.unit.free_calibration()

    def _start(self) -> None:
        """Depth units start as the recipe says; width units from least squares on the first steps' samples."""
        recipe, settings, layers = self.recipe, self.recipe.distill, self.library.layers
        replicas = self.engine.grid.get_data_parallel_group()
        width = [unit for unit in self.plan.units if not unit.takes_blocks]
        begins = settings.start != "first" or settings.start_from is not None
        if begins:
            earlier = open_earlier(recipe, self.teacher, self.plan)
            again = partial(self._calibration, "start")
            start_depth_units(layers, self.plan, self.teacher, settings.start, earlier, again, replicas)
        if width:
            narrows = any(unit.keep for unit in width)
            calibrate(layers, partial(self._calibration, "least squares"), replicas, recipe.probe.ridge, narrows)
        if begins or width:
            self.engine.optimizer.refresh_fp32_params()

    def _calibration(self, title: str) -> Iterator[Mapping[str, UnitBatch]]:
        """The micro-batches of the first steps, as often as they are asked for; they leave no trace."""
        steps = self.recipe.distill.calibration_steps
        with self.data.aside() if isinstance(self.data, TrajectoryStream) else nullcontext():
            yield from track(self.arrivals(self.batches(0), steps), title, steps * self.engine.micro_batches)

    def flops(self, samples: int) -> float:
        settings = self.recipe.distill
        return self.work.per_step(samples, settings.activation_checkpointing, settings.replay.uses)

    def measured(self) -> dict[str, float]:
        """Losses, norm ratios and gradient norms of this stage's units."""
        norms = self.engine.optimizer.norms
        return self.library.drain() | {f"{name}/gradient_norm": norm for name, norm in norms.items()}

    def skipped(self) -> dict[str, float]:
        return {f"{name}/skipped_steps": float(count) for name, count in self.engine.optimizer.skipped.items()}

    def look(self, draws: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
        owner = {name: stage for stage, names in enumerate(self.library.stage_units) for name in names}
        units = {layer.name: layer.unit for layer in self.library.layers}
        return look(self.preview(), self.plan, self.sharded, units, owner, self.group, draws)
