"""What fine-tuning a variant will need: memory of every stage, and a step with the pipeline's idle share.

The variant's blocks are measured as if each were a unit of its own: a copy of the teacher block whose shape it has.
What width units take away of a block is taken off its parameters and FLOPs in proportion, and not off its activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ppcl_ds.data.noising import DTYPES
from ppcl_ds.estimate.accelerators import Accelerator
from ppcl_ds.estimate.layout import Layout, stage_bounds
from ppcl_ds.estimate.measured import Measured, measure
from ppcl_ds.estimate.memory import Memory, Parts, gathered_memory, memory_with, teacher_memory
from ppcl_ds.estimate.question import Question, ask
from ppcl_ds.estimate.settings import Settings
from ppcl_ds.estimate.sizing import Sized, Stage, cluster_of, fits, notes_on, smallest_cluster
from ppcl_ds.estimate.speed import Step
from ppcl_ds.estimate.traffic import Traffic, busiest, exchange, gathers, ring
from ppcl_ds.finetune.trainable import Trainable
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import Finetune
from ppcl_ds.training.flops import unit_passes
from ppcl_ds.units.kinds import boundaries_of, parameters_saved
from ppcl_ds.units.plan import Plan, UnitPlan


class TuningStage(Stage):
    """One of fine-tuning.

    Attributes:
        blocks: how many of the variant's.
    """

    blocks: int


class Tuning(Sized):
    """Of fine-tuning a variant. The `units` of its step are the pipeline: forwards and backwards of the fullest stage,
    what it passes on, waiting.

    Attributes:
        variant: its name.
        parameters: of the variant.
        micro_batches: of a pipeline in a step.
        idle: share of the pipeline's time in which a stage waits, (P - 1) / (M + P - 1) for P equal stages and M
            micro-batches.
    """

    variant: str
    parameters: int
    micro_batches: int
    idle: float
    stages: tuple[TuningStage, ...]


def size_tuning(
    recipe: Recipe,
    settings: Finetune,
    variant: str,
    nodes: int,
    gpus_per_node: int,
    accelerator: Accelerator,
    *,
    utilisation: float = 0.4,
    latent_size: tuple[int, int] | None = None,
    text_tokens: int | None = None,
) -> Tuning:
    """Estimate `ppcl finetune RECIPE --variant VARIANT` on a cluster. Nothing is written, and no weights are read.

    Args:
        settings: the recipe's section `finetune`.
        accelerator: one in each process.
        utilisation: share of its peak that matrix products reach.
        latent_size: H and W of a sample; the recipe's by default.
        text_tokens: tokens of its prompt; the recipe's by default.

    Raises:
        UserError: recipe, plan, teacher, cluster and sample do not go together; the message says which.
    """
    asked = ask(recipe, settings, nodes, gpus_per_node, latent_size, text_tokens, variant)
    layout = asked.layout
    blocks = _blocks(recipe, settings, variant, asked)
    stages = blocks.stages(layout)
    most = sum(not stays for stays in blocks.joined)
    rounds = blocks.rounds(layout)
    samples = rounds * layout.world * settings.micro_batch
    passes = unit_passes(settings.activation_checkpointing)
    count = rounds * layout.stages
    return Tuning(
        variant=variant,
        plan=asked.words,
        parameters=sum(blocks.parameters) + blocks.rest,
        latents=asked.latents,
        text_tokens=asked.tokens,
        precision=recipe.teacher.precision,
        cluster=cluster_of(layout),
        accelerator=accelerator,
        utilisation=utilisation,
        notes=notes_on("finetune", settings, recipe.teacher.precision, layout.world, rounds * layout.world),
        samples=samples,
        micro_batches=count,
        step_flops=samples * (blocks.run.work.teacher + passes * sum(blocks.costs)),
        step=_step(blocks, stages, layout, accelerator, utilisation),
        idle=(layout.stages - 1) / (count + layout.stages - 1),
        stages=stages,
        fits=fits([stage.memory for stage in stages], accelerator),
        smallest=smallest_cluster(
            recipe.topology,
            gpus_per_node,
            most,
            asked.sharing,
            accelerator,
            lambda smaller: [stage.memory for stage in blocks.stages(smaller)],
        ),
    )


@dataclass(frozen=True)
class _Blocks:
    """A variant's blocks in order, and what else does not depend on the cluster.

    Attributes:
        joined: whether each has to stay with the one before.
        parameters: of each.
        trained: those of them that are; of a block with width units, all of it.
        costs: FLOPs of a sample's forward through each.
        entering: bytes of the streams that enter each, of one micro-batch.
        activations: bytes that training each on one micro-batch takes.
        targets: bytes of the teacher's streams that each is judged by, of one micro-batch.
        rest: parameters that belong to no block; every stage has them.
        trained_rest: those of them that are trained.
    """

    joined: list[bool]
    parameters: list[int]
    trained: list[int]
    costs: list[float]
    entering: list[int]
    activations: list[int]
    targets: list[int]
    rest: int
    trained_rest: int
    run: Measured
    settings: Finetune
    sharing: Settings

    def rounds(self, layout: Layout) -> int:
        """Teacher forwards of each process in a step."""
        return -(-self.settings.micro_batches_per_step // layout.world)

    def bounds(self, layout: Layout) -> list[int]:
        """First block of each stage, and the number of blocks."""
        return stage_bounds(self.joined, self.costs, layout.stages)

    def messages(self, layout: Layout) -> list[int]:
        """Bytes that each stage reads of one micro-batch before the pipeline runs: its inputs, and its targets.

        About: prompts and latents are no larger than what they become.
        """
        return [self.entering[0] + sum(self.targets[a:b]) for a, b in pairwise(self.bounds(layout))]

    def stages(self, layout: Layout) -> tuple[TuningStage, ...]:
        """What each stage holds."""
        found = []
        for number, (first, stop) in enumerate(pairwise(self.bounds(layout))):
            own = range(first, stop)
            found.append(
                TuningStage(
                    blocks=len(own),
                    parameters=sum(self.parameters[block] for block in own),
                    flop_share=sum(self.costs[block] for block in own) / sum(self.costs),
                    memory=self._memory(number, own, layout),
                )
            )
        return tuple(found)

    def _memory(self, stage: int, own: range, layout: Layout) -> Memory:
        """Memory of a process of `stage`.

        - Teacher forward: the block at work, gathered parameters, recorded boundaries. All forwards of a step come
          first, so what the stage will read of all micro-batches piles up.
        - Pipeline: 1F1B holds the activations of as many micro-batches as there are stages from this one on; with
          checkpointing what enters each block, and beside it all activations of one block.
        """
        run, checkpointing = self.run, self.settings.activation_checkpointing
        parameters = sum(self.parameters[block] for block in own) + self.rest
        trained = sum(self.trained[block] for block in own) + self.trained_rest
        micro_batches = self.rounds(layout) * layout.stages
        waiting = micro_batches * self.messages(layout)[stage]
        each = 12 + (4 if self.settings.ema else 0)
        resident = teacher_memory(layout, run, self.sharing) | {
            "blocks": parameters * run.element,
            "gradients": trained * 4,
            "optimizer": 0 if self.sharing.offload else -(-trained // layout.replicas) * each,
        }
        kept = sum((self.entering if checkpointing else self.activations)[block] for block in own)
        moments: dict[str, Parts] = {
            "teacher forward": {
                "gathered block": gathered_memory(layout, run, self.sharing),
                "activations": run.teacher_activations,
                "boundaries": sum(self.targets),
                "inputs and targets": waiting,
            },
            "pipeline": {
                "activations in flight": min(micro_batches, layout.stages - stage) * kept,
                "one block": max(self.activations[block] for block in own) if checkpointing else 0,
                "inputs and targets": waiting,
                "gradient on its way to its sum": run.largest_parameter * 4 if run.element < 4 else 0,
            },
        }
        return memory_with(stage, resident, moments)


def _step(
    blocks: _Blocks, stages: tuple[TuningStage, ...], layout: Layout, accelerator: Accelerator, utilisation: float
) -> Step:
    """Work, traffic and time of a step.

    - Teacher: the slower of its FLOPs and its gathers, which run ahead of it.
    - Pipeline: as many slots as micro-batches and stages but one, each as long as the fullest stage computes and the
      busiest process passes streams and their gradients on; DeepSpeed does one after the other. Before it, inputs and
      targets of all micro-batches are exchanged.
    - Reduction: gradients over the replicas, those of what every stage has over the stages, too.
    """
    run, settings, ranks = blocks.run, blocks.settings, range(layout.world)
    rounds = blocks.rounds(layout)
    count, bounds = rounds * layout.stages, blocks.bounds(layout)
    messages = blocks.messages(layout)
    rate = accelerator.tflops * 1e12 * utilisation
    share = max(stage.flop_share for stage in stages)
    slot = settings.micro_batch * sum(blocks.costs) * share * unit_passes(settings.activation_checkpointing)

    def passed_on(rank: int) -> Traffic:
        """Of one micro-batch: streams to the next stage, gradients to the one before; as much comes back."""
        moved = {True: 0, False: 0}
        pipe, stage = layout.pipe_group(rank), layout.stage_of(rank)
        for other, edge in ((stage - 1, stage), (stage + 1, stage + 1)):
            if 0 <= other < layout.stages:
                moved[layout.node_of(pipe[other]) == layout.node_of(rank)] += blocks.entering[bounds[edge]]
        return Traffic(intra=moved[True], inter=moved[False])

    def reduced(rank: int) -> Traffic:
        first, stop = bounds[layout.stage_of(rank) :][:2]
        size = (sum(blocks.trained[first:stop]) + blocks.trained_rest) * (2 * 4 + run.element)
        everywhere = ring(blocks.trained_rest * 2 * 4, rank, layout.pipe_group(rank), layout)
        return ring(size, rank, layout.data_group(rank), layout) + everywhere

    gathered = busiest([gathers(rank, layout, run, blocks.sharing) for rank in ranks], accelerator).times(rounds)
    sent = busiest([exchange(rank, messages, layout) for rank in ranks], accelerator).times(rounds)
    wire = busiest([passed_on(rank) for rank in ranks], accelerator)
    reduction = busiest([reduced(rank) for rank in ranks], accelerator)
    teacher_flops = rounds * settings.micro_batch * run.work.teacher
    teacher = max(teacher_flops / rate, gathered.seconds(accelerator))
    slots = (count + layout.stages - 1) * (slot / rate + wire.seconds(accelerator))
    pipeline = slots + sent.seconds(accelerator)
    reducing = reduction.seconds(accelerator)
    return Step(
        teacher_flops=teacher_flops,
        unit_flops=count * slot,
        gathers=gathered,
        exchange=sent + wire.times(count),
        reduction=reduction,
        teacher=teacher,
        units=pipeline,
        reducing=reducing,
        seconds=teacher + pipeline + reducing,
    )


def _blocks(recipe: Recipe, settings: Finetune, variant: str, asked: Question) -> _Blocks:
    """Measure a variant's blocks."""
    units = _blocks_as_units(asked.plan, variant)
    run = measure(
        asked.teacher,
        units,
        asked.latents,
        asked.tokens,
        micro_batch=settings.micro_batch,
        dtype=DTYPES[recipe.teacher.precision],
        checkpointing=False,
    )
    left = _left(asked, variant, run)
    names = [unit.name for unit in units.units]
    text = {block for unit in asked.plan.width_units(variant) if unit.kind == "text" for block in unit.members}
    entering = [sum(stream.nbytes for stream in run.parcels[name].inputs.values()) for name in names]
    targets = [0] * len(names)
    if settings.boundary_weight:
        for place, (_, streams) in boundaries_of(asked.plan, variant).items():
            targets[place] = len(streams) * max(entering)  # at most: both streams together
    parameters = [round(run.unit_parameters[name] * left[name]) for name in names]
    rest = sum(n for n, _ in run.parameters) - sum(block.parameters for block in asked.teacher.blocks)
    learns = _learns(asked.plan, variant, settings.trainable)
    return _Blocks(
        joined=[unit.span[0] in text for unit in units.units],
        parameters=parameters,
        trained=[n if learning else 0 for n, learning in zip(parameters, learns, strict=True)],
        costs=[run.work.units[name] * left[name] for name in names],
        entering=entering,
        activations=[run.activations[name] for name in names],
        targets=targets,
        rest=rest,
        trained_rest=rest if settings.trainable == "all" else 0,
        run=run,
        settings=settings,
        sharing=asked.sharing,
    )


def _blocks_as_units(plan: Plan, variant: str) -> Plan:
    """The variant's blocks as units, the last one up to the teacher's last: the teacher runs to its end."""
    origins = [origin for origin, _ in plan.places(variant)]
    units = tuple(
        UnitPlan(name=f"block {n}", span=(o, plan.blocks - 1 if o == origins[-1] else o), streams=("image",))
        for n, o in enumerate(origins)
    )
    return Plan(teacher=plan.teacher, blocks=plan.blocks, units=units, variants={})


def _places(unit: UnitPlan) -> Sequence[int]:
    """The teacher's blocks in whose place, or in parts of which, a unit is."""
    return unit.members if unit.kind == "text" else unit.span[:1]


def _learns(plan: Plan, variant: str, trainable: Trainable) -> list[bool]:
    """Whether each block of a variant is trained, or a part of it."""
    origins = [origin for origin, _ in plan.places(variant)]
    changed = {block for unit in plan.units_of(variant) for block in _places(unit)}
    units = [origin in changed for origin in origins]
    if trainable == "neighbours":
        return [any(units[max(0, place - 1) : place + 2]) for place in range(len(units))]
    return [trainable == "all" or unit for unit in units]


def _left(asked: Question, variant: str, run: Measured) -> dict[str, float]:
    """Share of its parameters that each block has left."""
    lost = dict.fromkeys((origin for origin, _ in asked.plan.places(variant)), 0.0)
    for unit in asked.plan.width_units(variant):
        members = _places(unit)
        saved = parameters_saved(unit, asked.teacher) / len(members)
        for block in members:
            lost[block] += saved
    return {
        name: 1 - gone / whole for (name, whole), gone in zip(run.unit_parameters.items(), lost.values(), strict=True)
    }
