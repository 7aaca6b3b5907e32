"""The distillation run: one frozen teacher, one library of units, all of it trained at once."""

from __future__ import annotations

import time
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor

from ppcl_ds.console import progress
from ppcl_ds.data.encoders import image_encoder
from ppcl_ds.distill.engine import LocalEngine
from ppcl_ds.distill.exchange import Exchange
from ppcl_ds.distill.library import Inbox, Library
from ppcl_ds.distill.plugged import plugged
from ppcl_ds.distill.rounds import Rounds, parcels_of
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.call import caller_for
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.families.reader import DTYPES, NoisyBatch, NoisyStream, read_teacher
from ppcl_ds.families.sampling import draw
from ppcl_ds.families.sharded import load_teacher
from ppcl_ds.planning.plan import Plan
from ppcl_ds.recipe import Distill, Recipe, checkpoint_tag, read_deepspeed_file
from ppcl_ds.units.depth import Parcel
from ppcl_ds.watch.board import Board, peak_memory_gib
from ppcl_ds.whole import write_whole

_PICTURES = 8
"""Pictures of each model in TensorBoard."""


class Trainer:
    """A run on this rank; every rank of the world constructs one and calls the same methods.

    Args:
        recipe: the run.
        plan: units and variants, already checked against the teacher.
    """

    def __init__(self, recipe: Recipe, plan: Plan, files: ModelFiles, anatomy: Anatomy) -> None:
        self.recipe, self.plan, self.anatomy = recipe, plan, anatomy
        self.device = torch.device(get_accelerator().current_device_name())
        self.caller = caller_for(files.class_name)
        # The teacher first: it must not see the students' process grid, which DeepSpeed keeps in a global.
        teacher_config = read_deepspeed_file(recipe.deepspeed.teacher)
        self.teacher = load_teacher(files, teacher_config, DTYPES[recipe.teacher.precision])
        self.inbox = Inbox()
        self.library = Library(
            plan,
            files,
            anatomy,
            stages=recipe.topology.stages,
            dtype=DTYPES[recipe.teacher.precision],
            inbox=self.inbox,
            magnitude_weight=recipe.distill.magnitude_weight,
            checkpointing=recipe.distill.activation_checkpointing,
        )
        self.engine = _student_engine(self.library, recipe)
        self.group = self.engine.grid.get_pipe_parallel_group()
        self.exchange = Exchange(self.group, self.engine.stage_id, self.library.stage_units)
        self.board = Board(recipe.board)

    def forward(self, batch: NoisyBatch) -> dict[str, Parcel]:
        """One teacher forward on this rank's micro-batch; collective over all ranks."""
        capture, _ = read_teacher(self.teacher, self.anatomy, self.caller, batch)
        return parcels_of(capture, batch.prompts.mask, self.plan, self.anatomy)

    def train(self) -> None:
        """Train to the recipe's last step, from the newest checkpoint if there is one."""
        settings = self.recipe.distill
        done = self._resume()
        rounds = self._rounds(done)

        def due(step: int, every: int) -> bool:
            return bool(every) and (step % every == 0 or step == settings.steps)

        with progress("distill", settings.steps, done) as advance:
            seconds, logged = 0.0, done
            for step in range(done + 1, settings.steps + 1):
                began = time.perf_counter()
                self.engine.train_batch(rounds)
                seconds += time.perf_counter() - began
                advance(1)
                if due(step, settings.log_every):
                    self._log(step, seconds / (step - logged))
                    seconds, logged = 0.0, step
                if due(step, settings.checkpoint_every):
                    self._save(step)
                if due(step, settings.sample_every):
                    self._look(step)

    def _resume(self) -> int:
        folder = self.recipe.checkpoints
        if not (folder / "latest").exists():
            if dist.get_rank() == 0:
                self.plan.save(self.recipe.trained_plan)
                write_whole(self.recipe.trained_recipe, self.recipe.model_dump_json(indent=1))
            return 0
        _, state = self.engine.load_checkpoint(str(folder))
        return int(state["step"])

    def _rounds(self, step: int) -> Rounds:
        """This rank's micro-batches behind `step`: of the numbers in a step, each rank takes every world-th."""
        rank, world = dist.get_rank(), dist.get_world_size()
        first = step * self.recipe.distill.micro_batches_per_step + rank
        stream = NoisyStream(self.recipe, "train", self.recipe.distill.micro_batch, self.device)
        return Rounds(stream.take(first, world), self.forward, self.exchange, self.inbox, self.device)

    def _save(self, step: int) -> None:
        """Write a checkpoint; it counts only once every rank has written its part.

        DeepSpeed would name it the latest before the other ranks have finished.
        """
        folder, tag = self.recipe.checkpoints, checkpoint_tag(step)
        self.engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, save_latest=False)
        dist.barrier()
        if dist.get_rank() == 0:
            write_whole(folder / "latest", tag)

    def _log(self, step: int, seconds: float) -> None:
        """Write what was measured since the last time; `seconds` is one step's share."""
        settings = self.recipe.distill
        own = self.library.drain()
        own["run/learning_rate"] = float(self.engine.get_lr()[0])
        own["run/samples_per_second"] = settings.micro_batch * settings.micro_batches_per_step / seconds
        own["run/loss"] = float(self.engine.agg_train_loss)
        own[f"memory_gib/rank_{dist.get_rank()}"] = peak_memory_gib()
        self.board.scalars(step, own)

    def _look(self, step: int) -> None:
        """Velocity error and pictures of every variant on held-out data, the same noise for all."""
        stream = NoisyStream(self.recipe, "heldout", _PICTURES, self.device)
        [(_, batch)] = islice(stream.take(0, 1), 1)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(self.recipe.seed))
        noise = noise.to(batch.latents)
        pictures, errors = {}, {}
        owner = {name: stage for stage, names in enumerate(self.library.stage_units) for name in names}
        units = {layer.plan.name: layer.unit for layer in self.library.layers}
        model = self.teacher.module
        reference: Tensor | None = None
        for name in ["teacher", *self.plan.variants]:
            inside = plugged(model, self.anatomy, self.plan, name, units, self.group, owner)
            with nullcontext() if name == "teacher" else inside:
                velocity = self._velocity(batch)
                latents = draw(
                    self.teacher,
                    self.caller,
                    noise,
                    batch.prompts,
                    stream.empty.to(self.device, noise.dtype),
                    steps=self.recipe.evaluate.steps,
                    shift=self.recipe.noise.shift,
                    guidance=self.recipe.evaluate.guidance,
                )
            reference = velocity if reference is None else reference
            errors[f"heldout/velocity_mse/{name}"] = float((velocity - reference).float().square().mean())
            pictures[name] = image_encoder(self.recipe.data.images).decode(latents.float().cpu())
        self.board.scalars(step, {name: value for name, value in errors.items() if not name.endswith("/teacher")})
        self.board.pictures(step, pictures)

    @torch.no_grad()
    def _velocity(self, batch: NoisyBatch) -> Tensor:
        return self.caller(self.teacher, batch.latents, batch.prompts, batch.sigmas)


def _student_engine(library: Library, recipe: Recipe) -> LocalEngine:
    settings, topology = recipe.distill, recipe.topology
    parameters = [p for p in library.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.optimizer.lr,
        betas=settings.optimizer.betas,
        weight_decay=settings.optimizer.weight_decay,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.optimizer.warmup_steps, settings.steps)
    config = student_config(read_deepspeed_file(recipe.deepspeed.students), settings, topology.replicas, recipe)
    mpu = library.mpu()
    return LocalEngine(
        args=None,
        model=library,
        optimizer=optimizer,
        model_parameters=parameters,
        training_data=None,
        lr_scheduler=schedule,
        mpu=mpu,
        dist_init_required=False,
        collate_fn=None,
        config=config,
        config_class=DeepSpeedConfig(config, mpu),
    )


def student_config(config: dict[str, Any], settings: Distill, replicas: int, recipe: Recipe) -> dict[str, Any]:
    """The DeepSpeed file with what the recipe decides filled in: batch and precision."""
    return config | {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.micro_batches_per_step // replicas,
        "bf16": config.get("bf16", {}) | {"enabled": recipe.teacher.precision == "bf16"},
    }
