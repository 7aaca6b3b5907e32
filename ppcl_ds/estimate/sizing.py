"""All numbers of an estimate, from a recipe and a teacher of which `config.json` is enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from ppcl_ds.data.noising import DTYPES
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import Accelerator
from ppcl_ds.estimate.layout import Layout, layouts_of_growing_clusters, units_by_stage
from ppcl_ds.estimate.measured import Measured, measure
from ppcl_ds.estimate.memory import Memory, memory_of
from ppcl_ds.estimate.probing import Probing, probing_of
from ppcl_ds.estimate.question import ask
from ppcl_ds.estimate.settings import Settings
from ppcl_ds.estimate.speed import Step, step_of
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import Precision, Topology, Training

_MOST_NODES = 128
"""Largest cluster that is searched for one that is large enough."""


class Numbers(BaseModel):
    """Base of the parts of an estimate."""

    model_config = ConfigDict(frozen=True)


class Cluster(Numbers):
    """Nodes and how the run is laid out on them."""

    nodes: int
    gpus_per_node: int
    stages: int
    replicas: int


class Stage(Numbers):
    """One pipeline stage.

    Attributes:
        parameters: that it trains, or of the blocks that it holds.
        flop_share: its part of all stages' work.
        memory: of one of its processes.
    """

    parameters: int
    flop_share: float
    memory: Memory


class LibraryStage(Stage):
    """One of distillation.

    Attributes:
        units: names of its units.
        parameter_share: its part of the library.
    """

    units: tuple[str, ...]
    parameter_share: float


class Sized(Numbers):
    """What a training on a cluster needs, and whether the cluster has it.

    Attributes:
        plan: where the units come from, in words.
        latents: (C, H, W) of a sample.
        text_tokens: tokens of its prompt.
        precision: number format of teacher and students while they run.
        cluster: the one asked about.
        accelerator: the one in it.
        utilisation: share of the accelerator's peak that matrix products are taken to reach.
        notes: where the estimate departs from the recipe.
        samples: in a step.
        step_flops: of a step, over all processes.
        step: of the busiest process.
        stages: in order.
        fits: whether the fullest stage fits.
        smallest: the cluster of fewest nodes (1, 2, 4, ...) that the run fits on; None if 128 are too few.
    """

    plan: str
    latents: tuple[int, int, int]
    text_tokens: int
    precision: str
    cluster: Cluster
    accelerator: Accelerator
    utilisation: float
    notes: tuple[str, ...]
    samples: int
    step_flops: float
    step: Step
    stages: tuple[Stage, ...]
    fits: bool
    smallest: Cluster | None

    @property
    def fullest(self) -> Stage:
        """The stage whose processes need most memory."""
        return max(self.stages, key=lambda stage: stage.memory.peak)


class Estimate(Sized):
    """Of distillation.

    Attributes:
        teacher: class name.
        teacher_parameters: their number.
        units: how many there are.
        unit_parameters: their number, all units together.
        micro_batches: in a step; if the recipe's do not fill the cluster, the next number that does.
        teacher_flops: of a sample's forward, up to the last block that a unit needs.
        unit_flops: of a sample's forward through every unit.
        probing: what `ppcl probe` needs on the cluster asked about.
    """

    teacher: str
    teacher_parameters: int
    units: int
    unit_parameters: int
    micro_batches: int
    teacher_flops: float
    unit_flops: float
    stages: tuple[LibraryStage, ...]
    probing: Probing


def size_run(
    recipe: Recipe,
    nodes: int,
    gpus_per_node: int,
    accelerator: Accelerator,
    *,
    utilisation: float = 0.4,
    latent_size: tuple[int, int] | None = None,
    text_tokens: int | None = None,
) -> Estimate:
    """Estimate `ppcl distill RECIPE` on a cluster. Nothing is written, and no weights are read.

    Args:
        accelerator: one in each process.
        utilisation: share of its peak that matrix products reach.
        latent_size: H and W of a sample; the recipe's by default.
        text_tokens: tokens of its prompt; the recipe's by default.

    Raises:
        UserError: recipe, plan, teacher, cluster and sample do not go together; the message says which.
    """
    settings = recipe.distill
    asked = ask(recipe, settings, nodes, gpus_per_node, latent_size, text_tokens)
    layout, teacher, plan, sharing = asked.layout, asked.teacher, asked.plan, asked.sharing
    if not plan.units:
        raise UserError(f"plan {recipe.plan_file}: it has no units, so there is nothing to train")
    run = measure(
        teacher,
        plan,
        asked.latents,
        asked.tokens,
        micro_batch=settings.micro_batch,
        dtype=DTYPES[recipe.teacher.precision],
        checkpointing=settings.activation_checkpointing,
    )
    spread = units_by_stage(run.work.units, layout.stages)
    stages = tuple(_stage(index, spread, layout, run, sharing) for index in range(layout.stages))
    micro_batches = -(-settings.micro_batches_per_step // layout.world) * layout.world
    samples = micro_batches * settings.micro_batch
    step = step_of(
        spread,
        layout,
        run,
        sharing,
        accelerator,
        micro_batches=micro_batches,
        checkpointing=settings.activation_checkpointing,
        utilisation=utilisation,
    )
    return Estimate(
        teacher=teacher.class_name,
        teacher_parameters=sum(elements for elements, _ in run.parameters),
        plan=asked.words,
        units=len(plan.units),
        unit_parameters=sum(run.unit_parameters.values()),
        latents=asked.latents,
        text_tokens=asked.tokens,
        precision=recipe.teacher.precision,
        cluster=cluster_of(layout),
        accelerator=accelerator,
        utilisation=utilisation,
        notes=notes_on("distill", settings, recipe.teacher.precision, layout.world, micro_batches),
        samples=samples,
        micro_batches=micro_batches,
        teacher_flops=run.work.teacher,
        unit_flops=sum(run.work.units.values()),
        step_flops=run.work.per_step(samples, settings.activation_checkpointing),
        step=step,
        stages=stages,
        fits=fits([stage.memory for stage in stages], accelerator),
        smallest=smallest_cluster(
            recipe.topology,
            gpus_per_node,
            len(plan.units),
            sharing,
            accelerator,
            lambda smaller: _memories(smaller, run, sharing),
        ),
        probing=probing_of(
            teacher,
            recipe.probe,
            asked.latents,
            asked.tokens,
            world=layout.world,
            accelerator=accelerator,
            utilisation=utilisation,
        ),
    )


def notes_on(section: str, settings: Training, precision: Precision, world: int, micro_batches: int) -> tuple[str, ...]:
    """Where an estimate departs from the recipe.

    Args:
        section: the name of `settings` in the recipe.
        micro_batches: that are assumed, in a step.
    """
    notes = []
    asked = settings.micro_batches_per_step
    if micro_batches != asked:
        notes.append(
            f"{section}.micro_batches_per_step is {asked}, not a multiple of {world} processes: {micro_batches} assumed"
        )
    if precision != "bf16":
        notes.append("times are those of bf16; memory is that of the recipe's precision")
    return tuple(notes)


def _stage(index: int, spread: list[list[str]], layout: Layout, run: Measured, settings: Settings) -> LibraryStage:
    names, costs, work = spread[index], run.unit_parameters, run.work.units
    parameters, flops = sum(costs[name] for name in names), sum(work[name] for name in names)
    return LibraryStage(
        units=tuple(names),
        parameters=parameters,
        parameter_share=parameters / sum(costs.values()),
        flop_share=flops / sum(work.values()),
        memory=memory_of(index, spread, layout, run, settings),
    )


def _memories(layout: Layout, run: Measured, settings: Settings) -> list[Memory]:
    spread = units_by_stage(run.work.units, layout.stages)
    return [memory_of(stage, spread, layout, run, settings) for stage in range(layout.stages)]


def smallest_cluster(
    topology: Topology,
    gpus_per_node: int,
    most_stages: int,
    settings: Settings,
    accelerator: Accelerator,
    memories: Callable[[Layout], Sequence[Memory]],
) -> Cluster | None:
    """The cluster of fewest nodes (1, 2, 4, ...) that a run fits on; None if 128 are too few.

    Args:
        topology: the recipe's; numbers of stages like its own come first.
        memories: what the stages of a layout need.
    """
    for layout in layouts_of_growing_clusters(topology, gpus_per_node, most_stages, _MOST_NODES):
        if layout.world % settings.ranks_per_copy == 0 and fits(memories(layout), accelerator):
            return cluster_of(layout)
    return None


def fits(memories: Sequence[Memory], accelerator: Accelerator) -> bool:
    """Whether the fullest stage does."""
    return max(memory.peak for memory in memories) <= accelerator.usable_bytes


def cluster_of(layout: Layout) -> Cluster:
    """A layout as numbers."""
    return Cluster(
        nodes=layout.nodes, gpus_per_node=layout.gpus_per_node, stages=layout.stages, replicas=layout.replicas
    )
