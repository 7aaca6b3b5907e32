"""An estimate as tables for a person: memory and the verdict first, then what nobody has measured."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.table import Table

from ppcl_ds.estimate.accelerators import RESERVED
from ppcl_ds.estimate.numbers import Estimate
from ppcl_ds.probing.costs import ProbingCosts
from ppcl_ds.training.phases import Parts
from ppcl_ds.training.traffic import Cluster, Traffic

_LAYERS = {"distill": "units", "finetune": "blocks"}
"""What a training lays over its stages."""


def show(estimate: Estimate) -> None:
    """Print what a training needs, where it goes, the verdict, and the least that a step takes."""
    console = Console(highlight=False)
    for line in _assumptions(estimate):
        console.print(line, soft_wrap=True, markup=False)
    console.print(_memory(estimate))
    console.print(_stages(estimate))
    for line in _verdict(estimate):
        console.print(line, soft_wrap=True, markup=False)
    console.print(_step(estimate))
    console.print(_least(estimate), soft_wrap=True, markup=False)
    if estimate.runs:
        console.print(_runs(estimate))
    if estimate.probing is not None:
        console.print(_probing(estimate.probing, estimate.probing_peak, estimate.probing_seconds))


def _assumptions(e: Estimate) -> Iterator[str]:
    yield f"teacher: {e.teacher}, {_count(e.teacher_parameters)} parameters"
    number = sum(len(stage.layers) for stage in e.stages)
    what = f"variant: {e.variant}" if e.variant else "library"
    yield f"plan: {e.plan}"
    yield f"{what}: {number} {_LAYERS[e.training]}, {_count(e.parameters)} parameters"
    unit = "pixels and frames" if e.sample.frames > 1 else "pixels"
    tokens = ", ".join(f"{count} {name}" for name, count in e.tokens.items())
    yield (
        f"sample: {e.sample} {unit} ({tokens} tokens), {e.precision}; {e.samples} samples a step, in "
        f"{e.micro_batches} micro-batches"
    )
    yield f"cluster: {_words(e.cluster)}; {e.accelerator.name}"
    yield from (f"note: {note}" for note in e.notes)


def _memory(e: Estimate) -> Table:
    memory = e.memory
    title = f"Memory of a process of stage {e.fullest}" + (", the fullest" if len(e.stages) > 1 else "")
    table = Table("", "bytes", "of which", title=title)
    for part, size in memory.resident.items():
        if size:
            table.add_row(part, _bytes(size), "")
    table.add_section()
    table.add_row("all the time", _bytes(sum(memory.resident.values())), "")
    for phase, parts in memory.phases.items():
        table.add_row(f"+ in {phase}", _bytes(sum(parts.values())), _list(parts))
    table.add_section()
    table.add_row("peak", _bytes(memory.peak), f"in {memory.worst}")
    table.add_row(e.accelerator.name, _bytes(e.accelerator.usable_bytes), f"{RESERVED:.0%} are left alone")
    if memory.host:
        table.add_section()
        table.add_row("CPU memory of a process", _bytes(sum(memory.host.values())), _list(memory.host))
    return table


def _stages(e: Estimate) -> Table:
    table = Table("stage", _LAYERS[e.training], "parameters", "share", "FLOPs", "peak", title="Stages")
    for number, stage in enumerate(e.stages):
        shares = f"{stage.parameter_share:.1%}", f"{stage.flop_share:.1%}"
        count = _count(stage.parameters)
        table.add_row(str(number), str(len(stage.layers)), count, *shares, _bytes(stage.memory.peak))
    return table


def _verdict(e: Estimate) -> Iterator[str]:
    peak, usable = _bytes(e.memory.peak), _bytes(e.accelerator.usable_bytes)
    yield f"{'fits' if e.trains else 'does not fit'}: {peak} of the {usable} that may be filled ({e.accelerator.name})"
    if e.trains and not e.fits:
        yield (
            f"probing does not fit: {_bytes(e.probing_peak)} of the {usable}; these take less memory: a smaller "
            "probe.batch_size, no probe.blocks_at_once, a larger teacher.ranks_per_copy"
        )
    if e.smallest is not None:
        yield f"smallest cluster that fits: {_words(e.smallest)}"
    else:
        yield (
            f"no cluster of up to 128 such nodes fits; these take less memory: {e.training}.activation_checkpointing, "
            f"{e.training}.optimizer.offload, a smaller {e.training}.micro_batch, a larger teacher.ranks_per_copy"
        )


def _step(e: Estimate) -> Table:
    table = Table(
        "", "computed", "in the node", "between nodes", "least seconds", title="A step of the busiest process"
    )
    for phase in e.step:
        if phase.flops or phase.seconds:
            computed = _flops(phase.flops) if phase.flops else ""
            table.add_row(phase.name, computed, *_links(phase.moved), f"{phase.seconds:.3g}")
    waits = [f"\na stage waits {phase.waits:.0%} of the {phase.name}'s time" for phase in e.step if phase.waits]
    table.caption = f"{_flops(e.step_flops)} a step over all processes" + "".join(waits)
    return table


def _runs(e: Estimate) -> Table:
    table = Table("", "teacher forwards", "computed", "accelerator hours", "of this", title="The whole distillation")
    first = e.runs[0]
    for run in e.runs:
        share = f"{run.flops / first.flops:.0%}"
        table.add_row(run.name, f"{_count(int(run.forwards))}", _flops(run.flops), f"{run.hours:.3g}", share)
    return table


def _least(e: Estimate) -> str:
    machine = e.accelerator
    return (
        f"at least {e.seconds:.3g} s a step, at most {e.samples / e.seconds:.3g} samples/s (lower bound: arithmetic at "
        f"{e.utilisation:.0%} of {machine.tflops:g} TFLOP/s, traffic at {machine.intra_gb:g} GB/s in a node and "
        f"{machine.inter_gb:g} between nodes; not measured)"
    )


def _probing(probing: ProbingCosts, peak: int, seconds: float) -> Table:
    several = f"{probing.passes} pass{'es' if probing.passes > 1 else ''}"
    table = Table("", "", title="Probing")
    table.add_row("sums of a process", _bytes(probing.sums))
    table.add_row("boundaries of a micro-batch", _bytes(probing.boundaries))
    table.add_row("peak, with the teacher", _bytes(peak))
    table.add_row("file of a --part", _bytes(probing.part))
    table.add_section()
    table.add_row(f"teacher, {several} over {probing.samples} samples", _flops(probing.teacher_flops))
    table.add_row("moments, float64", _flops(probing.moment_flops))
    table.add_row("probes and chains, float64", _flops(probing.figure_flops))
    table.add_row("minutes, at least", f"{seconds / 60:.3g}")
    return table


def _words(cluster: Cluster) -> str:
    def several(number: int, word: str) -> str:
        return f"{number} {word}{'s' if number > 1 else ''}"

    return (
        f"{several(cluster.nodes, 'node')} x {several(cluster.gpus_per_node, 'GPU')}, "
        f"as {several(cluster.stages, 'stage')} x {several(cluster.replicas, 'replica')}"
    )


def _list(parts: Parts) -> str:
    return ", ".join(f"{part} {_bytes(size)}" for part, size in parts.items() if size)


def _links(traffic: Traffic) -> tuple[str, str]:
    return (_bytes(traffic.intra) if traffic.intra else "", _bytes(traffic.inter) if traffic.inter else "")


def _bytes(size: float) -> str:
    unit, suffix = pick_unit_and_suffix(int(size), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 1024)
    return f"{size / unit:.1f} {suffix}"


def _flops(number: float) -> str:
    unit, suffix = pick_unit_and_suffix(
        int(number), ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"], 1000
    )
    return f"{number / unit:.3g} {suffix}"


def _count(number: int) -> str:
    unit, suffix = pick_unit_and_suffix(number, ["", " k", " M", " B"], 1000)
    return f"{number / unit:.3g}{suffix}"
