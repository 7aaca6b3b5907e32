"""Fine-tuning: one variant end to end, against the data and the frozen teacher's velocity."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from ppcl_ds.finetune.pipeline import Variant, VariantEngine
from ppcl_ds.finetune.preview import look
from ppcl_ds.finetune.stage import stage_batch, weighted
from ppcl_ds.finetune.start import Origin, Start
from ppcl_ds.finetune.trainable import block_costs, joined, parts_of
from ppcl_ds.recipe import read_deepspeed_file
from ppcl_ds.teacher.anatomy import Anatomy, Wanted
from ppcl_ds.teacher.files import empty_model
from ppcl_ds.teacher.noising import NoisyBatch
from ppcl_ds.teacher.samples import other_branch
from ppcl_ds.teacher.teacher import forward, text_mask
from ppcl_ds.teacher.trajectories import TrajectoryStream
from ppcl_ds.training.delivery import Deliveries
from ppcl_ds.training.engine import StudentsEngine
from ppcl_ds.training.flops import unit_passes
from ppcl_ds.training.meta_forward import meta_forward
from ppcl_ds.training.stages import stage_bounds
from ppcl_ds.training.trainer import Training
from ppcl_ds.units.kinds import boundaries_of
from ppcl_ds.units.unit import UnitBatch


class FineTuner(Training):
    """A fine-tuning on this rank.

    Args:
        start: what it starts from.
    """

    def __init__(self, start: Start) -> None:
        self.start, self.tuning = start, start.settings
        settings = start.settings
        self.weights = {
            "flow": settings.flow_weight,
            "velocity": settings.velocity_weight,
            "boundary": settings.boundary_weight,
        }
        title = f"finetune {start.variant}"
        super().__init__(start.recipe, settings, start.folder, start.plan, start.teacher, title)
        # A step may hold many passes; each is a sign of life.
        self.pipeline.stage.register_forward_pre_hook(lambda *_: self.watchdog.alive())

    def build(self) -> tuple[StudentsEngine, list[list[str]]]:
        recipe, settings, plan = self.recipe, self.tuning, self.plan
        whole = self.start.layout(self.dtype)
        empty = empty_model(whole.config)
        anatomy = Anatomy(empty, self.teacher.flows)
        parts = parts_of(anatomy, empty, whole.tensors, settings.trainable)
        forward = meta_forward(self.teacher, self.sample_size())
        costs = block_costs(forward.block_flops, self.teacher.anatomy, empty, plan.places(self.start.variant))
        keys = [block.key for block in anatomy.blocks]
        self.bounds = stage_bounds(joined(whole.config, keys), costs, recipe.topology.stages)
        self.flops_of_sample = forward.flops_until[-1] + sum(costs) * unit_passes(settings.activation_checkpointing)
        self.boundaries = boundaries_of(plan, self.start.variant) if settings.boundary_weight else {}
        exits = frozenset(block for block, _ in self.boundaries.values())
        self.wanted = Wanted(calls=frozenset(), exits=exits, to_the_end=True)
        self.queue: deque[UnitBatch] = deque()
        self.waiting: list[tuple[NoisyBatch, Tensor, Tensor | None]] = []
        """Of a step, where trajectories are the variant's own: micro-batches of this rank, and what the teacher has put
        out for their arguments and the other branch."""
        self.pipeline = Variant(
            self.bounds,
            whole,
            parts,
            settings.kept_lr,
            call=self.teacher.call,
            flows=self.teacher.flows,
            inbox=self.queue,
            weights=self.weights,
            magnitude_weight=recipe.distill.magnitude_weight,
            scale=recipe.topology.replicas / settings.micro_batches_per_step,
            checkpointing=settings.activation_checkpointing,
        )
        config = read_deepspeed_file(recipe.deepspeed.students)
        engine = VariantEngine(self.pipeline, config, settings, recipe.teacher.precision)
        return engine, [[name] for name in self.stage_names]

    @property
    def stage_names(self) -> list[str]:
        """What each stage's batches are called."""
        return [f"stage {number}" for number in range(self.recipe.topology.stages)]

    @torch.no_grad()
    def read_teacher(self, batch: NoisyBatch) -> dict[str, UnitBatch]:
        """One teacher forward to its end; each stage gets the inputs, and the targets that it is judged by."""
        with self.teacher.anatomy.record(self.sharded.module, self.wanted) as capture:
            output = forward(self.sharded, batch.arguments)
        self.advance(batch, output)
        velocity = self.teacher.call.stepped_by(output, batch.size)
        mask = text_mask(batch.arguments, capture)
        batches = {}
        for number, name in enumerate(self.stage_names):
            blocks = range(self.bounds[number], self.bounds[number + 1])
            targets = {
                f"boundary/{place}/{stream}": capture.streams[self.teacher.blocks[block].leaving][stream]
                for place, (block, streams) in self.boundaries.items()
                for stream in streams
                if place in blocks
            }
            if number == len(self.bounds) - 2:
                targets["velocity"] = velocity
                if self.tuning.trajectories is None:
                    targets["flow"] = batch.target
            batches[name] = stage_batch(batch.arguments, batch.size, targets, mask)
        return batches

    def begin(self) -> None:
        """Also write down where the units were trained."""
        super().begin()
        assert self.start.library is not None
        checkpoint = self.start.library.checkpoint
        Origin(checkpoint=checkpoint.folder, step=checkpoint.contents.step).write(self.folder)

    def prepare(self, done: int) -> None:
        """Nothing: the variant starts as its units were left."""

    @property
    def together(self) -> bool:
        return True

    def step(self, batches: Deliveries) -> None:
        """One optimizer step: all teacher forwards, then the pipeline; both are collective, in different orders."""
        own = self.stage_names[self.engine.stage_id]
        self.queue.extend(arrived[own] for arrived in self.arrivals(batches))
        with self.timer.phase("students"):
            if not self.own_way:
                self.engine.train_step()
                return
            said = self.engine.told_step([output for _, output, _ in self.waiting])
        assert isinstance(self.data, TrajectoryStream)
        with self.timer.phase("data"):
            for (batch, _, other), output in zip(self.waiting, said, strict=True):
                if batch.number is not None:
                    self.data.advance(batch.number, output, other)
            self.waiting.clear()

    def advance(self, batch: NoisyBatch, output: Tensor | None) -> None:
        """Trajectories of the variant's own wait for what it puts out."""
        if not self.own_way:
            super().advance(batch, output)
            return
        assert isinstance(self.data, TrajectoryStream)
        assert output is not None, "the teacher runs to its end"
        self.waiting.append((batch, output, other_branch(self.data, batch, self.sharded)))

    def total_loss(self, values: Mapping[str, float]) -> float:
        return float(weighted(values, self.weights))

    def flops(self, samples: int) -> float:
        return samples * self.flops_of_sample

    def measured(self) -> dict[str, float]:
        norms = self.engine.optimizer.norms
        return self.pipeline.stage.means.drain() | {f"{name}/gradient_norm": norm for name, norm in norms.items()}

    def skipped(self) -> dict[str, float]:
        """All parts skip together."""
        counts = self.engine.optimizer.skipped
        return {f"{self.start.variant}/skipped_steps": float(max(counts.values(), default=0))}

    def look(self, draws: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Losses by noise level and images, the variant beside the teacher."""
        return look(self.preview(), self.tuning.quantiles, self.sharded, self.engine, draws)
