"""The distillation run: one frozen teacher, one library of units, all of it trained at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ppcl_ds import launch
from ppcl_ds.console import progress, track
from ppcl_ds.distill.calibrate import calibrate
from ppcl_ds.distill.engine import LocalEngine
from ppcl_ds.distill.exchange import Exchange
from ppcl_ds.distill.journal import Journal
from ppcl_ds.distill.library import Inbox, Library
from ppcl_ds.distill.pictures import look
from ppcl_ds.distill.rounds import Rounds
from ppcl_ds.distill.saver import Saver
from ppcl_ds.distill.start import write_start
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.work import Work, measure_work
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.call import caller_for
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.families.reader import DTYPES, NoisyBatch, NoisyStream, read_teacher
from ppcl_ds.families.sharded import load_teacher
from ppcl_ds.planning.parcels import parcels_of, wanted_by
from ppcl_ds.planning.plan import Plan
from ppcl_ds.recipe import Recipe, read_deepspeed_file
from ppcl_ds.units.unit import Parcel
from ppcl_ds.watch.board import gather, peak_memory_gib
from ppcl_ds.watch.clock import Clock, matrix_rate
from ppcl_ds.watch.stall import StallWatch
from ppcl_ds.watch.stop import StopWatch


class Trainer:
    """A run on this rank; every rank of the world constructs one and calls the same methods.

    Args:
        recipe: the run.
        plan: units and variants, already checked against the teacher.
    """

    def __init__(self, recipe: Recipe, plan: Plan, files: ModelFiles, anatomy: Anatomy) -> None:
        self.recipe, self.plan, self.files, self.anatomy = recipe, plan, files, anatomy
        settings, dtype = recipe.distill, DTYPES[recipe.teacher.precision]
        self.device = torch.device(get_accelerator().current_device_name())
        self.caller = caller_for(files.class_name)
        # The teacher first: it must not see the students' process grid, which DeepSpeed keeps in a global.
        config = read_deepspeed_file(recipe.deepspeed.teacher)
        self.teacher = load_teacher(files, config, dtype, recipe.teacher.ranks_per_copy)
        self.wanted = wanted_by(plan, anatomy)
        self.data = NoisyStream(recipe, "train", settings.micro_batch, self.device)
        self.inbox = Inbox()
        self.work = self._work()
        self.library = Library(
            plan,
            files,
            anatomy,
            costs=self.work.units,
            stages=recipe.topology.stages,
            dtype=dtype,
            inbox=self.inbox,
            magnitude_weight=settings.magnitude_weight,
            checkpointing=settings.activation_checkpointing,
        )
        students = read_deepspeed_file(recipe.deepspeed.students)
        self.engine = LocalEngine(self.library, students, settings, recipe.teacher.precision)
        self.group = self.engine.grid.get_pipe_parallel_group()
        words, _ = dist.new_subgroups_by_enumeration(self.engine.grid.pipe_groups, backend="gloo")
        self.exchange = Exchange(self.group, words, self.engine.stage_id, self.library.stage_units)
        self.stall = StallWatch(settings.timeout)
        self.stop = StopWatch(recipe.run, recipe.trained_plan.parent)
        self.clock = Clock(self.stall.tell)
        self.saver = Saver(recipe.checkpoints, settings.keep_checkpoints, self.engine, self.stall.moves)
        # A phase may hold many forwards; each is a sign of life.
        self.teacher.module.register_forward_pre_hook(lambda *_: self.stall.moves())
        launch.set_timeout(settings.timeout)

    def forward(self, batch: NoisyBatch) -> dict[str, Parcel]:
        """One teacher forward on this rank's micro-batch, as far as units need it; collective over all ranks."""
        capture = read_teacher(self.teacher, self.anatomy, self.caller, batch, self.wanted)
        return parcels_of(capture, batch.prompts.mask, self.plan, self.anatomy)

    def rounds(self, step: int) -> Rounds:
        """This rank's micro-batches behind `step`: of the numbers in a step, each rank takes every world-th."""
        rank, world = dist.get_rank(), dist.get_world_size()
        first = step * self.recipe.distill.micro_batches_per_step + rank
        stream = self.data.take(first, world)
        # The first one is read now, before anybody watches the time: the way to it may be long after a restart.
        batches = chain([next(stream)], stream)
        return Rounds(batches, self.forward, self.exchange, self.inbox, self.clock, self.device)

    def train(self, until: int | None = None) -> None:
        """Train to the recipe's last step, from the newest checkpoint if there is one.

        Args:
            until: stop behind this step already, with a checkpoint.

        Raises:
            UserError: the last checkpoint cannot be written; older ones are there.
        """
        settings = self.recipe.distill
        last = min(until or settings.steps, settings.steps)
        done = self._resume()
        journal = self._journal()
        rounds = self.rounds(done)

        def due(step: int, every: int) -> bool:
            return bool(every) and (step % every == 0 or step == last)

        with self.stall:
            self._settle_units(done)
            with progress("distill", last, done) as advance:
                logged = done
                for step in range(done + 1, last + 1):
                    self.stall.step = step
                    with self.clock.phase("students"):
                        self.engine.train_batch(rounds)
                    note = ""
                    if due(step, settings.log_every):
                        note = journal.write(step, self._measured(), self.clock.drain(), step - logged)
                        logged = step
                    advance(1, note)
                    stops = step < last and self.stop.asked(step)
                    if stops or due(step, settings.checkpoint_every):
                        self._save(step, stops or step == last)
                    if stops:
                        break
                    if due(step, settings.sample_every):
                        self._look(step, journal)
        journal.print_units()
        if dist.get_rank() == 0 and (bad := int(journal.newest.get("data/bad_samples", 0))):
            print(f"bad samples that were skipped: {bad}; {self.recipe.bad_samples} names them")

    def _resume(self) -> int:
        if (self.recipe.checkpoints / "latest").exists():
            return self.saver.load()
        if dist.get_rank() == 0:
            write_start(self.recipe, self.plan)
        return 0

    def _settle_units(self, done: int) -> None:
        """What units need before the first step; none of it counts as a step's time."""
        if not done:
            self._calibrate()
        for layer in self.library.layers:
            layer.unit.settle()
        self.clock.drain()

    def _calibrate(self) -> None:
        """Start the width units from least squares on the first steps' samples."""
        width = [unit for unit in self.plan.units if unit.kind != "depth"]
        if not width:
            return
        count = self.recipe.distill.calibration_steps * self.engine.micro_batches

        def pull() -> Iterator[None]:
            rounds = self.rounds(0)
            for _ in track(range(count), "least squares", count):
                next(rounds)
                yield

        narrows = any(unit.keep for unit in width)
        calibrate(
            self.library.layers, pull, self.engine.grid.get_data_parallel_group(), self.recipe.probe.ridge, narrows
        )
        self.engine.optimizer.refresh_fp32_params()

    def _work(self) -> Work:
        """What a sample takes, from the shapes of the first one that is stored."""
        batch = self.data.clean.first()
        _, channels, height, width = batch.latents.shape
        tokens = batch.prompts.embeds.shape[1]
        return measure_work(self.files, self.anatomy, self.plan, (channels, height, width), tokens)

    def _journal(self) -> Journal:
        settings = self.recipe.distill
        samples = settings.micro_batch * settings.micro_batches_per_step
        return Journal(
            self.recipe.board,
            self.plan,
            samples=samples,
            flops=self.work.per_step(samples, settings.activation_checkpointing),
            matrix_rate=matrix_rate(self.device, DTYPES[self.recipe.teacher.precision]),
            skipped=gather(self._skipped()),
        )

    def _measured(self) -> dict[str, float]:
        """What this rank knows of the last steps."""
        optimizer = self.engine.optimizer
        own = self.library.drain()
        own |= {f"{name}/gradient_norm": norm for name, norm in optimizer.norms.items()}
        own |= self._skipped()
        own["data/bad_samples"] = float(self.data.clean.share())
        own["run/learning_rate"] = float(self.engine.get_lr()[0])
        own[f"memory_gib/rank_{dist.get_rank()}"] = peak_memory_gib()
        return own

    def _skipped(self) -> dict[str, float]:
        return {f"{name}/skipped_steps": float(count) for name, count in self.engine.optimizer.skipped.items()}

    def _save(self, step: int, last: bool) -> None:
        with self.clock.phase("checkpoint"):
            complaint = self.saver.save(step)
        if complaint and last:
            raise UserError(f"{complaint}; make room and run the same command: it goes on from the last checkpoint")
        if complaint and dist.get_rank() == 0:
            print(f"warning: no checkpoint of step {step}: {complaint}; training goes on", flush=True)

    def _look(self, step: int, journal: Journal) -> None:
        owner = {name: stage for stage, names in enumerate(self.library.stage_units) for name in names}
        units = {layer.plan.name: layer.unit for layer in self.library.layers}
        with self.clock.phase("pictures"):
            errors, pictures = look(
                self.recipe, self.plan, self.anatomy, self.caller, self.teacher, units, owner, self.group, self.device
            )
        journal.board.scalars(step, errors)
        journal.board.pictures(step, pictures)
