"""`ppcl estimate`: what a run will need, before anybody queues for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ppcl_ds.atomic import atomic_write
from ppcl_ds.data.batch import Size
from ppcl_ds.data.index import split_entries
from ppcl_ds.distill.phases import Distilling
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import Accelerator, accelerator_for
from ppcl_ds.estimate.inputs import Inputs, read_inputs
from ppcl_ds.estimate.layouts import fits, has_room, instead, layouts, smallest
from ppcl_ds.estimate.measured import account_of, run_once
from ppcl_ds.estimate.numbers import Estimate, Memory, Stage, WholeRun, add_up, least_time
from ppcl_ds.estimate.road import Walked, with_road
from ppcl_ds.estimate.show import show
from ppcl_ds.estimate.whole import whole_runs
from ppcl_ds.finetune.phases import FineTuning
from ppcl_ds.launch import FILLED
from ppcl_ds.probing.costs import ProbingCosts, probing_costs
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import Precision
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.meta_forward import MetaForward
from ppcl_ds.training.phases import Account
from ppcl_ds.training.traffic import Cluster

_NODE = 8
"""Accelerators of a node that a dry run assumes where they fill whole ones."""

_ASSUMED = "a caption of 23 words is assumed, as nothing is encoded yet"


def estimate(
    recipe: Recipe,
    nodes: int,
    gpus_per_node: int | None = None,
    *,
    accelerator: str | None = None,
    utilisation: float = 0.4,
    pixels: str | None = None,
    variant: str | None = None,
    price: float | None = None,
    details: bool = False,
    json: Path | None = None,
) -> bool:
    """Print the estimate, and write it to `json` if given.

    Args:
        variant: that is to be fine-tuned; None: distilling is estimated, and the whole road with it.
        gpus_per_node: all processes of the recipe's topology by default.
        accelerator: by name; None: see `accelerator_for`.
        pixels: of a sample, as on the command line, see `read_size`.
        price: of an accelerator hour.
        details: print the memory by phase, the stages and the phases of a step, too.

    Returns:
        Whether the run fits.

    Raises:
        UserError: an argument is wrong, or recipe, plan and teacher do not go together.
    """
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation:g}: give a share of the peak, more than 0 and at most 1")
    machine, known = accelerator_for(recipe, accelerator)
    sides = None if pixels is None else read_size(pixels)
    asked = recipe.topology.world if gpus_per_node is None else gpus_per_node
    inputs = read_inputs(recipe, nodes, asked, variant, sides)
    node = max(asked, _NODE) if gpus_per_node is None and machine.name != "CPU" else asked
    found = _whole(inputs, machine, utilisation, node, price).model_copy(update={"accelerator_from": known})
    if not found.layouts:
        found = found.model_copy(update={"instead": instead(inputs, machine, utilisation)})
    show(found, details)
    if json is not None:
        try:
            atomic_write(json, found.model_dump_json(indent=1) + "\n")
        except OSError as fault:
            raise UserError(f"--json {json}: {fault.strerror}") from None
    return found.fits


def print_estimate(recipe: Recipe, teacher: Teacher, variant: str | None = None) -> None:
    """What a dry run says of a training that has been checked: its estimate, and how often it reads its shards."""
    world = recipe.topology.world
    nodes = 1 if world % _NODE else world // _NODE
    inputs = read_inputs(recipe, nodes, world // nodes, variant, teacher=teacher)
    machine, known = accelerator_for(recipe)
    show(size(inputs, machine).model_copy(update={"accelerator_from": known}))
    training = inputs.training
    entries = split_entries(recipe.data, "train")
    samples = sum(entry.samples for entry in entries)
    epochs = training.steps * training.micro_batch * training.micro_batches_per_step / samples
    print(f"shards: {len(entries)} with {samples} samples, read {epochs:.3g} times in {training.steps} steps")
    print("recipe, plan, topology and shards are in order; `ppcl estimate` sizes it for other clusters")


def _whole(inputs: Inputs, accelerator: Accelerator, utilisation: float, node: int, price: float | None) -> Estimate:
    """The training that is asked about; with a distillation all other steps of the road."""
    forward = run_once(inputs)
    account = account_of(inputs, forward)
    found = _sized(inputs, forward, account, accelerator, utilisation, node)
    if inputs.variant is not None:
        return found
    tuned = inputs.recipe.finetune.variants if inputs.recipe.finetune else ()
    names = tuple(name for name in tuned if name in inputs.plan.variants or name in inputs.recipe.plan.variants)
    tunings = {name: size(_tuning(inputs, name), accelerator, utilisation) for name in names}
    return with_road(found, Walked(inputs, forward, found, tunings, price))


def _tuning(inputs: Inputs, variant: str) -> Inputs:
    """The same for fine-tuning a variant; a plan that was assumed for another one is assumed for this."""
    cluster, teacher = inputs.cluster, inputs.teacher
    return read_inputs(inputs.recipe, cluster.nodes, cluster.gpus_per_node, variant, inputs.size, teacher)


def read_size(text: str) -> Size:
    """As `Size.read`.

    Raises:
        UserError: it is no size.
    """
    try:
        return Size.read(text)
    except ValueError as fault:
        raise UserError(f"--size: {fault}") from None


def size(inputs: Inputs, accelerator: Accelerator, utilisation: float = 0.4) -> Estimate:
    """Estimate a training. Nothing is written, and no weights are read.

    Args:
        accelerator: one in each process.
        utilisation: share of its peak that matrix products reach.

    Raises:
        UserError: plan, teacher, stages and sample do not go together; the message says which.
    """
    forward = run_once(inputs)
    account = account_of(inputs, forward)
    return _sized(inputs, forward, account, accelerator, utilisation, inputs.cluster.gpus_per_node)


def _sized(
    inputs: Inputs,
    forward: MetaForward,
    account: Distilling | FineTuning,
    accelerator: Accelerator,
    utilisation: float,
    node: int,
) -> Estimate:
    """The numbers of an account.

    Args:
        node: accelerators of a node, where the smallest cluster is looked for.
    """
    recipe = inputs.recipe
    cluster, precision = inputs.cluster, recipe.teacher.precision
    phases = account.phases(cluster)
    memories = [add_up(stage) for stage in phases]
    step, seconds = least_time(phases, accelerator, utilisation)
    probing, probing_peak = None, 0
    runs: tuple[WholeRun, ...] = ()
    if isinstance(account, Distilling):
        runs = tuple(whole_runs(account, inputs, forward, accelerator, utilisation))
    if inputs.variant is None:
        probing, probing_peak = _probing(account, inputs, forward, accelerator)
    seen = inputs.seen
    return Estimate(
        training="finetune" if inputs.variant else "distill",
        variant=inputs.variant,
        teacher=inputs.teacher.class_name,
        teacher_parameters=sum(elements for elements, _ in account.teacher.parameters),
        plan=inputs.source,
        parameters=account.parameters,
        sample=inputs.size,
        tokens={stream: tensor.shape[1] for stream, tensor in forward.capture.streams[0].items()},
        precision=precision,
        cluster=cluster,
        accelerator=accelerator,
        accelerator_from="",
        samples_from=f"the longest caption of {seen.looked} encoded samples" if seen else _ASSUMED,
        notes=tuple(_notes(account, cluster, precision, accelerator)),
        stages=tuple(_stages(account, cluster, memories)),
        trains=fits(memories, accelerator),
        smallest=smallest(inputs, account, accelerator, node),
        layouts=tuple(layouts(inputs, account, accelerator, utilisation)),
        micro_batches=account.rounds(cluster) * cluster.world,
        samples=account.samples(cluster),
        step_flops=account.step_flops(cluster),
        utilisation=utilisation,
        step=step,
        seconds=seconds,
        runs=runs,
        probing=probing,
        probing_peak=probing_peak,
        probing_seconds=_probing_seconds(probing, cluster, accelerator, utilisation) if probing else 0.0,
    )


def _stages(account: Account, cluster: Cluster, memories: Sequence[Memory]) -> Iterator[Stage]:
    parameters, flops = (sum(getattr(layer, what) for layer in account.layers) for what in ("parameters", "flops"))
    for layers, memory in zip(account.cut(cluster.stages), memories, strict=True):
        own = sum(layer.parameters for layer in layers)
        yield Stage(
            layers=tuple(layer.name for layer in layers),
            parameters=own,
            parameter_share=own / parameters,
            flop_share=sum(layer.flops for layer in layers) / flops,
            memory=memory,
        )


def _notes(account: Account, cluster: Cluster, precision: Precision, accelerator: Accelerator) -> Iterator[str]:
    asked, micro_batches = account.settings.micro_batches_per_step, account.rounds(cluster) * cluster.world
    if micro_batches != asked:
        yield (
            f"{account.section}.micro_batches_per_step is {asked}, not a multiple of {cluster.world} processes: "
            f"{micro_batches} assumed"
        )
    if isinstance(account, Distilling) and account.uses > 1:
        yield from _places(account, cluster, accelerator)
    if cluster.world > 1:
        yield from _copies(account, cluster, accelerator)
    if precision != "bf16" and accelerator.name != "CPU":  # whose speed is measured in float32
        yield "times are those of bf16; memory is that of the recipe's precision"


def _places(account: Distilling, cluster: Cluster, accelerator: Accelerator) -> Iterator[str]:
    """What should be changed about where the replayed readings lie."""
    replay = account.settings.replay
    other = replay.model_copy(update={"offload": not replay.offload})
    elsewhere = replace(account, settings=account.settings.model_copy(update={"replay": other}))
    here, there = (has_room(each, cluster, accelerator) for each in (account, elsewhere))
    if there and (replay.offload or not here):
        has = "has room for" if replay.offload else "is too small for"
        yield f"set distill.replay.offload: {str(other.offload).lower()}; the accelerator {has} what is replayed"


def _copies(account: Account, cluster: Cluster, accelerator: Accelerator) -> Iterator[str]:
    """What should be changed about how many ranks share a copy of the teacher."""
    sharding = account.teacher.sharding
    divided = replace(sharding, whole=False, ranks_per_copy=cluster.gpus_per_node)
    other = divided if sharding.whole else replace(sharding, whole=True, offload=False)
    otherwise = replace(account.teacher, sharding=other)
    here, there = (has_room(each, cluster, accelerator) for each in (account, replace(account, teacher=otherwise)))
    if there and not sharding.whole:
        offload = " and leave teacher.offload out" if sharding.offload else ""
        yield (
            f"set teacher.ranks_per_copy: 1{offload}; each accelerator has room for the whole teacher, and nothing is "
            "gathered"
        )
    if there and sharding.whole and not here:
        yield "leave teacher.ranks_per_copy out; the accelerator is too small for the whole teacher"


def _probing(
    account: Account, inputs: Inputs, forward: MetaForward, accelerator: Accelerator
) -> tuple[ProbingCosts, int]:
    """What probing costs, and the peak of a process: as many sums as the teacher leaves room for."""
    teacher, batch, section = account.teacher, inputs.training.micro_batch, inputs.recipe.probe
    there = sum(teacher.resident(inputs.cluster).values()) + teacher.gathered(inputs.cluster)
    there += teacher.activations * section.batch_size // batch
    room = int(FILLED * (accelerator.usable_bytes - there))
    costs = probing_costs(inputs.teacher.anatomy, forward.capture, forward.flops_until, batch, section, room)
    return costs, there + costs.sums + costs.boundaries


def _probing_seconds(probing: ProbingCosts, cluster: Cluster, accelerator: Accelerator, utilisation: float) -> float:
    teacher = probing.teacher_flops / accelerator.tflops
    return (teacher + (probing.moment_flops + probing.figure_flops) / accelerator.tflops64) / (
        cluster.world * utilisation * 1e12
    )
