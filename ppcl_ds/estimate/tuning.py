"""What fine-tuning a variant will need: memory of every stage, and a step with the pipeline's idle share.

The variant's blocks are measured as if each were a unit of its own: a copy of the teacher block whose shape it has.
What width units take away of a block is taken off its parameters and FLOPs in proportion, and not off its activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ppcl_ds.estimate.accelerators import Accelerator
from ppcl_ds.estimate.layout import stage_bounds
from ppcl_ds.estimate.measured import Measured, measure
from ppcl_ds.estimate.memory import Memory, Parts, gathered_memory, teacher_memory
from ppcl_ds.estimate.question import Question, ask
from ppcl_ds.estimate.sizing import Cluster, Numbers, cluster_of
from ppcl_ds.estimate.traffic import gathers, ring
from ppcl_ds.estimate.work import unit_passes
from ppcl_ds.families.reader import DTYPES
from ppcl_ds.planning.budget import parameters_saved
from ppcl_ds.planning.parcels import boundaries_of
from ppcl_ds.planning.plan import Plan, UnitPlan
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import Finetune


class TuningStage(Numbers):
    """One pipeline stage.

    Attributes:
        blocks: how many of the variant's.
        parameters: of them.
        flop_share: its part of the variant.
        memory: of one of its processes.
    """

    blocks: int
    parameters: int
    flop_share: float
    memory: Memory


class Tuning(Numbers):
    """What fine-tuning a variant needs, and whether a cluster has it.

    Attributes:
        parameters: of the variant.
        samples: in a step.
        micro_batches: of a pipeline in a step.
        teacher: seconds of a step's teacher forwards.
        pipeline: seconds of its forwards and backwards, the fullest stage's, waiting included.
        idle: share of the pipeline's time in which a stage waits, (P - 1) / (M + P - 1) for P equal stages and M
            micro-batches.
        reducing: seconds in which gradients are averaged over the replicas.
    """

    variant: str
    plan: str
    parameters: int
    latents: tuple[int, int, int]
    text_tokens: int
    precision: str
    cluster: Cluster
    accelerator: Accelerator
    utilisation: float
    samples: int
    micro_batches: int
    stages: tuple[TuningStage, ...]
    teacher: float
    pipeline: float
    idle: float
    reducing: float
    fits: bool

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.teacher + self.pipeline + self.reducing

    @property
    def fullest(self) -> TuningStage:
        """The stage whose processes need most memory."""
        return max(self.stages, key=lambda stage: stage.memory.peak)


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
    blocks = _blocks_as_units(asked.plan, variant)
    run = measure(
        asked.files,
        asked.anatomy,
        blocks,
        asked.latents,
        asked.tokens,
        micro_batch=settings.micro_batch,
        dtype=DTYPES[recipe.teacher.precision],
        checkpointing=False,
    )
    left = _left(asked, variant, run)
    names = [unit.name for unit in blocks.units]
    costs = [run.work.units[name] * left[name] for name in names]
    text = {block for unit in asked.plan.width_units(variant) if unit.kind == "text" for block in unit.members}
    bounds = stage_bounds([unit.span[0] in text for unit in blocks.units], costs, layout.stages)
    targets = boundaries_of(asked.plan, variant) if settings.boundary_weight else {}
    spread = [names[a:b] for a, b in pairwise(bounds)]
    parameters = {name: round(run.unit_parameters[name] * left[name]) for name in names}
    rest = sum(n for n, _ in run.parameters) - sum(block.parameters for block in asked.anatomy.blocks)
    rounds = -(-settings.micro_batches_per_step // layout.world)
    count = rounds * layout.stages
    stages = tuple(
        TuningStage(
            blocks=len(own),
            parameters=sum(parameters[name] for name in own),
            flop_share=sum(costs[bounds[number] : bounds[number + 1]]) / sum(costs),
            memory=_memory(
                number,
                own,
                sum(parameters[name] for name in own) + rest,
                count,
                sum(len(streams) for place, (_, streams) in targets.items() if names[place] in own),
                asked,
                run,
                settings,
            ),
        )
        for number, own in enumerate(spread)
    )
    rate = accelerator.tflops * 1e12 * utilisation
    gathered = max(gathers(rank, layout, run, asked.sharing).seconds(accelerator) for rank in range(layout.world))
    teacher = rounds * max(settings.micro_batch * run.work.teacher / rate, gathered)
    busiest = max(stage.flop_share for stage in stages) * sum(costs) * settings.micro_batch
    one = busiest * unit_passes(settings.activation_checkpointing) / rate
    fullest = max(stage.parameters for stage in stages) + rest
    size = fullest * (2 * 4 + run.element)
    reducing = max(
        ring(size, rank, layout.data_group(rank), layout).seconds(accelerator) for rank in range(layout.world)
    )
    return Tuning(
        variant=variant,
        plan=asked.words,
        parameters=sum(parameters.values()) + rest,
        latents=asked.latents,
        text_tokens=asked.tokens,
        precision=recipe.teacher.precision,
        cluster=cluster_of(layout),
        accelerator=accelerator,
        utilisation=utilisation,
        samples=rounds * layout.world * settings.micro_batch,
        micro_batches=count,
        stages=stages,
        teacher=teacher,
        pipeline=one * (count + layout.stages - 1),
        idle=(layout.stages - 1) / (count + layout.stages - 1),
        reducing=reducing,
        fits=max(stage.memory.peak for stage in stages) <= accelerator.usable_bytes,
    )


def _blocks_as_units(plan: Plan, variant: str) -> Plan:
    """The variant's blocks as units, the last one up to the teacher's last: the teacher runs to its end."""
    origins = [origin for origin, _ in plan.places(variant)]
    units = tuple(
        UnitPlan(name=f"block {n}", span=(o, plan.blocks - 1 if o == origins[-1] else o), streams=("image",))
        for n, o in enumerate(origins)
    )
    return Plan(teacher=plan.teacher, blocks=plan.blocks, units=units, variants={})


def _left(asked: Question, variant: str, run: Measured) -> dict[str, float]:
    """Share of its parameters that each block has left."""
    lost = dict.fromkeys((origin for origin, _ in asked.plan.places(variant)), 0.0)
    for unit in asked.plan.width_units(variant):
        members = list(unit.members) if unit.kind == "text" else [unit.span[0]]
        saved = parameters_saved(unit, asked.files, asked.anatomy) / len(members)
        for block in members:
            lost[block] += saved
    return {
        name: 1 - gone / whole for (name, whole), gone in zip(run.unit_parameters.items(), lost.values(), strict=True)
    }


def _memory(
    stage: int,
    own: Sequence[str],
    parameters: int,
    micro_batches: int,
    targets: int,
    asked: Question,
    run: Measured,
    settings: Finetune,
) -> Memory:
    """Memory of a process of `stage`; all of it is taken to be trained.

    - Teacher forward: the block at work, gathered parameters.
    - Pipeline: 1F1B holds the activations of as many micro-batches as there are stages from this one on; with
      checkpointing what enters each block, and beside it all activations of one block. And every micro-batch's inputs
      and targets, as all teacher forwards of a step come first.

    Args:
        targets: boundary streams that the stage is judged by.
    """
    layout, averages = asked.layout, 4 if settings.ema else 0
    share = -(-parameters // layout.replicas)
    resident = teacher_memory(layout, run, asked.sharing) | {
        "blocks": parameters * run.element,
        "gradients": parameters * 4,
        "optimizer": 0 if asked.sharing.offload else share * (12 + averages),
    }
    in_flight = min(micro_batches, layout.stages - stage)
    entering = [sum(stream.nbytes for stream in run.parcels[name].inputs.values()) for name in own]
    largest = max(run.activations[name] for name in own)
    kept = sum(entering) if settings.activation_checkpointing else sum(run.activations[name] for name in own)
    moments: dict[str, Parts] = {
        "teacher forward": {
            "gathered block": gathered_memory(layout, run, asked.sharing),
            "activations": run.teacher_activations,
        },
        "pipeline": {
            "activations in flight": in_flight * kept,
            "one block": largest if settings.activation_checkpointing else 0,
            "inputs": micro_batches * entering[0],  # about: prompts and latents are no larger than what they become
            "boundary targets": micro_batches * targets * max(entering),  # at most: both streams together
            "gradient on its way to its sum": run.largest_parameter * 4 if run.element < 4 else 0,
        },
    }
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    peak = sum(resident.values()) + sum(moments[worst].values())
    return Memory(stage=stage, resident=resident, moments=moments, worst=worst, peak=peak)
