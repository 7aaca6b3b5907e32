"""An estimate as a page for a person: the verdict first, then what the road costs, then lines to paste."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from ppcl_ds.estimate.accelerators import RESERVED
from ppcl_ds.estimate.numbers import Estimate
from ppcl_ds.estimate.show_details import show_details
from ppcl_ds.estimate.units import counted, lasting, priced, sized
from ppcl_ds.training.traffic import Cluster

LAYERS = {"distill": "units", "finetune": "blocks"}
"""What a training lays over its stages."""


def show(estimate: Estimate, details: bool = False) -> None:
    """Print what a training needs, whether it fits, what the road costs, and how to lay it out.

    Args:
        details: print where memory and time go, too.
    """
    console = Console(highlight=False)

    def say(lines: Iterator[str]) -> None:
        for line in lines:
            console.print(line, soft_wrap=True, markup=False)

    say(_asked(estimate))
    say(_verdict(estimate))
    if estimate.road:
        console.print(_road(estimate))
        say(_beside(estimate))
    say(_step(estimate))
    say(_to_paste(estimate))
    if details:
        show_details(console, estimate)


def _asked(e: Estimate) -> Iterator[str]:
    number = sum(len(stage.layers) for stage in e.stages)
    yield f"teacher: {e.teacher}, {counted(e.teacher_parameters)} parameters, {e.precision}"
    what = f"variant {e.variant}" if e.variant else "library"
    yield f"{what}: {number} {LAYERS[e.training]}, {counted(e.parameters)} parameters; plan: {e.plan}"
    unit = "pixels and frames" if e.sample.frames > 1 else "pixels"
    tokens = ", ".join(f"{count} {name}" for name, count in e.tokens.items())
    yield f"sample: {e.sample} {unit}, {tokens} tokens ({e.samples_from})"
    known = f" ({e.accelerator_from})" if e.accelerator_from else ""
    yield f"cluster: {words(e.cluster)}; {e.accelerator.name}{known}"
    yield from (f"note: {note}" for note in e.notes)


def _verdict(e: Estimate) -> Iterator[str]:
    peak, usable = sized(e.memory.peak), sized(e.accelerator.usable_bytes)
    stage = f" of stage {e.fullest}" if len(e.stages) > 1 else ""
    yield (
        f"{'fits' if e.trains else 'does not fit'}: {peak} of {usable} on each process{stage} "
        f"({e.accelerator.name} less {RESERVED:.0%}), most in {e.memory.worst}"
    )
    if not e.fits and e.trains:
        yield (
            f"probing does not fit: {sized(e.probing_peak)} of {usable}; these take less memory: a smaller "
            "probe.batch_size, no probe.blocks_at_once, a larger teacher.ranks_per_copy"
        )
    if e.smallest is not None:
        yield f"smallest cluster that fits: {words(e.smallest)}"
    else:
        yield (
            f"no cluster of up to 128 such nodes fits; these take less memory: {e.training}.activation_checkpointing, "
            f"{e.training}.optimizer.offload, a smaller {e.training}.micro_batch, a larger teacher.ranks_per_copy"
        )


def _road(e: Estimate) -> Table:
    prices = any(step.cost is not None for step in e.road)
    table = Table("step", "work", "time", "accelerator\nhours", *(["cost"] if prices else []))
    for step in e.road:
        used = [lasting(step.seconds), _hours(step.accelerator_hours)] if step.flops else ["", ""]
        table.add_row(step.name, step.work, *used, *([priced(step.cost)] if step.cost and step.flops else []))
    table.add_section()
    cost = [priced(sum(step.cost or 0 for step in e.road))] if prices else []
    hours = _hours(sum(step.accelerator_hours for step in e.road))
    table.add_row("together", "", lasting(sum(step.seconds for step in e.road)), hours, *cost)
    return table


def _beside(e: Estimate) -> Iterator[str]:
    yield "disk: " + ", ".join(f"{name} {sized(size)}" for name, size in e.disk.items())
    kept = f"{sized(e.host)} of what is offloaded" if e.host else "nothing is offloaded"
    yield f"CPU memory of a node: {kept}; the processes themselves come on top"


def _step(e: Estimate) -> Iterator[str]:
    machine = e.accelerator
    yield (
        f"a step takes at least {lasting(e.seconds)}, {counted(e.samples / e.seconds)} samples/s; lower bounds, not "
        f"measured: {e.utilisation:.0%} of {machine.tflops:.3g} TFLOP/s, {machine.intra_gb:g} GB/s in a node "
        f"and {machine.inter_gb:g} between nodes"
    )


def _to_paste(e: Estimate) -> Iterator[str]:
    if e.instead:
        yield "this would fit, to paste:"
        yield from (f"  {key}" for key in e.instead)
    elif e.layouts:
        best, batch = min(e.layouts, key=lambda layout: layout.seconds), e.samples // e.micro_batches
        yield "fastest layout of this cluster, to paste:"
        yield f"  topology: {{stages: {best.stages}, replicas: {best.replicas}}}"
        yield f"  micro_batch: {batch}  # in {e.training}"
        yield f"  micro_batches_per_step: {e.micro_batches}  # in {e.training}"


def words(cluster: Cluster) -> str:
    """A cluster in words."""

    def several(number: int, word: str) -> str:
        return f"{number} {word}{'s' if number > 1 else ''}"

    return (
        f"{several(cluster.nodes, 'node')} x {several(cluster.gpus_per_node, 'GPU')}, "
        f"as {several(cluster.stages, 'stage')} x {several(cluster.replicas, 'replica')}"
    )


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "< 0.01" if hours else "0"
    return f"{hours:.2f}" if hours < 1 else f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
