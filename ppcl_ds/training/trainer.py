"""What both kinds of training do: one frozen teacher, students in pipeline stages, step after step, checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from operator import itemgetter

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ppcl_ds import launch, reporting
from ppcl_ds.console import progress
from ppcl_ds.data.batch import Size
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe, TrainingFolder, teacher_config
from ppcl_ds.sections import Training as Settings
from ppcl_ds.teacher.noising import DTYPES, NoisyBatch, NoisyStream
from ppcl_ds.teacher.samples import take_further
from ppcl_ds.teacher.sharded import load_teacher
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.teacher.trajectories import TrajectoryStream
from ppcl_ds.training.checks import write_start
from ppcl_ds.training.delivery import Deliveries
from ppcl_ds.training.engine import StudentsEngine
from ppcl_ds.training.exchange import Exchange
from ppcl_ds.training.log import Log
from ppcl_ds.training.pictures import Pictures
from ppcl_ds.training.preview import Preview
from ppcl_ds.training.saver import Saver
from ppcl_ds.units.plan import Plan
from ppcl_ds.units.unit import UnitBatch
from ppcl_ds.watch.lock import FolderLock
from ppcl_ds.watch.mirror import Mirror
from ppcl_ds.watch.preemption import Preemption
from ppcl_ds.watch.tensorboard import mean_over_ranks, memory_figures
from ppcl_ds.watch.timer import Timer, matrix_rate
from ppcl_ds.watch.watchdog import Watchdog

_IMAGES_EVERY = 10
"""Looks at held-out data for each that draws images, which take a hundred times as long."""


class Training(ABC):
    """A training on this rank; every rank of the world constructs one and calls the same methods.

    Args:
        recipe: the run.
        settings: the recipe's section of this training.
        folder: what it writes.
        plan: units and variants, already checked against the teacher.
        title: what the progress display calls it.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: Settings,
        folder: TrainingFolder,
        plan: Plan,
        teacher: Teacher,
        title: str,
    ) -> None:
        self.recipe, self.settings, self.folder, self.title = recipe, settings, folder, title
        self.plan, self.teacher = plan, teacher
        self.lock = self._lock()
        self.dtype = DTYPES[recipe.teacher.precision]
        self.device = torch.device(get_accelerator().current_device_name())
        # The teacher first: it must not see the students' process grid, which DeepSpeed keeps in a global.
        config = teacher_config(recipe)
        self.sharded = load_teacher(teacher, config, self.dtype, recipe.teacher.ranks_per_copy)
        self.data = self.open_data()
        self.engine, readers = self.build()
        self.group = self.engine.grid.get_pipe_parallel_group()
        # Made by its members alone. Else every rank would make everybody's, and torch would have those that are not in
        # a gloo group split NCCL's for nothing, which comes out even only if all of them do so equally often.
        cpu_group = dist.new_group(
            dist.get_process_group_ranks(self.group), backend="gloo", use_local_synchronization=True
        )
        self.exchange = Exchange(self.group, cpu_group, self.engine.stage_id, readers, self.together)
        self.watchdog = Watchdog(settings.timeout, folder.path / "flight_recorder")
        self.preemption = Preemption(recipe.run, folder.path)
        self.timer = Timer(self.watchdog.on_phase)
        self.saver = Saver(
            folder.checkpoints,
            settings.keep_checkpoints,
            self.engine,
            self.watchdog.alive,
            self.preemption.group,
            self._pools,
        )
        # A phase may hold many forwards; each is a sign of life.
        self.sharded.module.register_forward_pre_hook(lambda *_: self.watchdog.alive())
        launch.set_timeout(settings.timeout)

    def _lock(self) -> FolderLock | None:
        """Rank 0's lock on the folder; all ranks raise if it cannot have it."""
        lock, problem = None, ""
        try:
            lock = FolderLock(self.folder.path) if dist.get_rank() == 0 else None
        except UserError as fault:
            problem = str(fault)
        if problem := launch.first_problem(problem):
            raise UserError(problem)
        return lock

    def open_data(self) -> NoisyStream | TrajectoryStream:
        """The samples, of which `batches` takes this rank's."""
        settings, call = self.settings, self.teacher.call
        size, lanes, trajectories = settings.micro_batch, settings.micro_batches_per_step, settings.trajectories
        if trajectories is None:
            return NoisyStream(self.recipe, call, "train", size, lanes, paired=self.paired)
        kept, images = self.kept, self.kept_pictures
        return TrajectoryStream(self.recipe, call, "train", size, lanes, trajectories, kept, images)

    @property
    def own_way(self) -> bool:
        """Whether samples are of the students' own trajectories, so that what comes next hangs on the step before."""
        trajectories = self.settings.trajectories
        return trajectories is not None and trajectories.of == "student"

    @property
    def paired(self) -> bool:
        """Whether noisy samples without prompt are twins of others, see `Batch.drop_captions`."""
        return False

    @property
    def kept(self) -> int:
        """Readings that are needed again after a restart."""
        return 1

    @property
    @abstractmethod
    def together(self) -> bool:
        """Whether everything that a round exchanges has to be there before anything is trained on it."""

    @property
    def kept_pictures(self) -> int:
        """How many finished images of trajectories are kept."""
        return 0

    @torch.no_grad()
    def advance(self, batch: NoisyBatch, output: Tensor | None) -> None:
        """Take trajectories one step further, if samples are of such; collective over all.

        Args:
            output: of the transformer.
        """
        if isinstance(self.data, TrajectoryStream):
            take_further(self.data, batch, output, self.sharded)

    def _pools(self, step: int) -> dict[str, Tensor]:
        """What samples after `step` are made from, where they do not follow from their numbers."""
        first = self.readings(step).start * self.settings.micro_batches_per_step
        return self.data.state(first) if isinstance(self.data, TrajectoryStream) else {}

    @abstractmethod
    def build(self) -> tuple[StudentsEngine, list[list[str]]]:
        """The students; and for each stage, the names of the batches that it reads."""

    def sample_size(self) -> Size:
        """Of the first sample that is stored."""
        return self.data.clean.first().size

    @abstractmethod
    def read_teacher(self, batch: NoisyBatch) -> Mapping[str, UnitBatch]:
        """One teacher forward on this rank's micro-batch, and what every stage reads of it; collective over all."""

    @abstractmethod
    def prepare(self, done: int) -> None:
        """What the students need before the first step, or after `done`; none of it counts as a step's time."""

    @abstractmethod
    def step(self, batches: Deliveries) -> None:
        """One optimizer step on this rank's next micro-batches; collective over all ranks."""

    @abstractmethod
    def measured(self) -> dict[str, float]:
        """What this rank knows of the steps since the last call."""

    @abstractmethod
    def skipped(self) -> dict[str, float]:
        """`NAME/skipped_steps` of what this rank trains: steps left out as the gradient was not finite."""

    def total_loss(self, values: Mapping[str, float]) -> float:
        """What the students are trained on, from everything that was measured."""
        return sum(value for name, value in values.items() if "/loss/" in name and math.isfinite(value))

    @abstractmethod
    def flops(self, samples: int) -> float:
        """FLOPs of an optimizer step of so many samples, over all ranks."""

    def preview(self) -> Preview:
        """What models are looked at with."""
        return Preview(self.recipe, self.teacher, self.device, self.settings.micro_batch, self.preemption.group)

    @abstractmethod
    def look(self, draws: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Figures of held-out data, and images if asked for, see `TensorBoard.images`; collective over all ranks."""

    def readings(self, step: int) -> range:
        """What the teacher reads after `step`, by number; a reading is as many micro-batches as a step has."""
        return range(step, self.settings.steps)

    def batches(self, step: int) -> Deliveries:
        """This rank's micro-batches after `step`: of the numbers in a reading, each rank takes every world-th."""
        rank, world, readings = dist.get_rank(), dist.get_world_size(), self.readings(step)
        first = readings.start * self.settings.micro_batches_per_step + rank
        stream = map(itemgetter(1), self.data.take(first, world))
        # The first one is read now, before anybody watches the time: the way to it may be long after a restart.
        rounds = self.engine.micro_batches // self.engine.num_stages
        ahead = 0 if self.own_way else len(readings) * rounds
        return Deliveries(chain([next(stream)], stream), self.device, ahead)

    def arrivals(self, batches: Deliveries, readings: int = 1) -> Iterator[dict[str, UnitBatch]]:
        """What this stage reads in so many readings, one micro-batch after the other.

        For each of its own micro-batches a rank runs the teacher; then those of all ranks of its pipe group arrive in
        turn. All ranks must ask alike. Memory holds one such round, however many micro-batches there are in a step: an
        arrival is emptied when the next one is asked for.
        """
        for _ in range(readings * self.engine.micro_batches // self.engine.num_stages):
            arriving = self._next_round(batches)
            for _ in range(self.engine.num_stages):
                with self.timer.phase("exchange"):
                    arrived = next(arriving)
                yield arrived
                arrived.clear()
            del arriving  # it holds what was received

    def _next_round(self, batches: Deliveries) -> Iterator[dict[str, UnitBatch]]:
        with self.timer.phase("data"):
            batch = next(batches)
        with self.timer.phase("teacher"):
            read = self.read_teacher(batch)
        with self.timer.phase("exchange"):
            arriving = self.exchange(read)
        with self.timer.phase("data"):
            batches.send_next()  # the device is busy with the teacher now
        return arriving

    def train(self, until: int | None = None) -> dict[str, float]:
        """Train to the recipe's last step, from the newest checkpoint if there is one.

        Args:
            until: stop after this step already, with a checkpoint.

        Returns:
            What was last written down.

        Raises:
            UserError: the last checkpoint cannot be written; older ones are there.
        """
        settings = self.settings
        last = min(until or settings.steps, settings.steps)
        reporting.keep_in(self.folder.progress).update()
        done = self._resume()
        log = self._log(done)
        batches = self.batches(done)

        def due(step: int, every: int) -> bool:
            return bool(every) and (step % every == 0 or step == last)

        with self.watchdog:
            self.prepare(done)
            self.timer.drain()
            with progress(self.title, last, done) as advance:
                logged = done
                for step in range(done + 1, last + 1):
                    self.watchdog.step = step
                    self.step(batches)
                    note = ""
                    if due(step, settings.log_every):
                        note = log.write(step, self._measured(), self.timer.drain(), step - logged)
                        logged = step
                    advance(1, note, log.newest.get("run/samples_per_second"), log.newest.get("run/loss"))
                    stops = step < last and self.preemption.requested(step)
                    if stops or due(step, settings.checkpoint_every):
                        with self.timer.phase("checkpoint"):
                            self.saver.save(step, stops or step == last)
                        log.board.images(step, self._keep_pictures(step))
                    if self.saver.writer is not None:
                        with self.timer.phase("checkpoint"):
                            self.saver.go_on()
                    if stops:
                        break
                    if due(step, settings.sample_every):
                        with self.timer.phase("preview"):
                            figures, images = self.look(due(step, _IMAGES_EVERY * settings.sample_every))
                        log.board.scalars(step, figures)
                        log.board.images(step, images)
        log.board.close()
        if dist.get_rank() == 0 and (bad := int(log.newest.get("data/bad_samples", 0))):
            print(f"bad samples that were skipped: {bad}; {self.recipe.bad_samples} names them")
        return log.newest

    def _resume(self) -> int:
        if self.folder.begun:
            done = self.saver.load()
            if isinstance(self.data, TrajectoryStream):
                self.data.load(self.saver.pools, dist.get_rank(), dist.get_world_size())
                Pictures(self.recipe, self.teacher.call).go_on(done, self.data)
            return done
        if dist.get_rank() == 0:
            self.begin()
        return 0

    def begin(self) -> None:
        write_start(self.recipe, self.folder, self.plan)

    def _log(self, done: int) -> Log:
        samples = self.settings.micro_batch * self.settings.micro_batches_per_step
        return Log(
            self.folder.board,
            done=done,
            samples=samples,
            flops=self.flops(samples),
            matrix_rate=matrix_rate(self.device, self.dtype),
            skipped=mean_over_ranks(self.skipped()),
            total=self.total_loss,
            mirror=partial(Mirror, self.recipe, self.folder) if self.recipe.wandb else None,
        )

    def _measured(self) -> dict[str, float]:
        own = self.measured() | self.skipped()
        own["data/bad_samples"] = float(self.data.clean.share())
        if isinstance(self.data, TrajectoryStream):
            own["data/dropped_pictures"] = float(self.data.dropped)  # the mean over ranks
        schedule = self.engine.lr_scheduler  # the first part's rate may be a multiple of the recipe's
        own["run/learning_rate"] = self.settings.optimizer.lr * schedule.lr_lambdas[0](schedule.last_epoch)
        return own | memory_figures(dist.get_rank())

    def _keep_pictures(self, step: int) -> dict[str, Tensor]:
        """Write the images that were finished, see `Pictures.keep`."""
        if not (isinstance(self.data, TrajectoryStream) and self.kept_pictures):
            return {}
        with self.timer.phase("checkpoint"):
            return Pictures(self.recipe, self.teacher.call).keep(step, self.data)
