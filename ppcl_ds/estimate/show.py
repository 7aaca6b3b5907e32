"""An estimate as tables for a person."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.table import Table

from ppcl_ds.estimate.accelerators import RESERVED
from ppcl_ds.estimate.memory import Parts
from ppcl_ds.estimate.sizing import Cluster, Estimate, Sized
from ppcl_ds.estimate.traffic import Traffic
from ppcl_ds.estimate.tuning import Tuning


def show(estimate: Estimate) -> None:
    """Print what a run needs, where it goes, and the verdict."""
    tables = _memory(estimate), _step(estimate, "unit training"), _stages(estimate), _probing(estimate)
    _print(_assumptions(estimate), tables, _verdict(estimate, "distill"))


def show_tuning(tuning: Tuning) -> None:
    """Print what fine-tuning a variant needs, and the verdict."""
    stages = Table("stage", "blocks", "parameters", "FLOPs", "peak", title="Stages")
    for number, stage in enumerate(tuning.stages):
        share = f"{stage.flop_share:.1%}"
        stages.add_row(str(number), str(stage.blocks), _count(stage.parameters), share, _bytes(stage.memory.peak))
    step = _step(tuning, "pipeline")
    step.caption = f"{step.caption}\na stage waits {tuning.idle:.0%} of the pipeline's time"
    lines = (
        f"variant: {tuning.variant}, {_count(tuning.parameters)} parameters; plan: {tuning.plan}",
        f"{_sample(tuning)}, {tuning.micro_batches} micro-batches of them in each pipeline",
        *_where(tuning),
    )
    _print(lines, (_memory(tuning), step, stages), _verdict(tuning, "finetune"))


def _print(before: Iterable[str], tables: Iterable[Table], behind: Iterable[str]) -> None:
    console = Console(highlight=False)
    for line in before:
        console.print(line, soft_wrap=True, markup=False)
    for table in tables:
        console.print(table)
    for line in behind:
        console.print(line, soft_wrap=True, markup=False)


def _assumptions(e: Estimate) -> Iterator[str]:
    yield f"teacher: {e.teacher}, {_count(e.teacher_parameters)} parameters"
    yield f"plan: {e.plan}; {e.units} units, {_count(e.unit_parameters)} parameters"
    yield _sample(e)
    yield from _where(e)


def _sample(e: Sized) -> str:
    size = "x".join(map(str, e.latents))
    return f"sample: latents {size}, {e.text_tokens} text tokens, {e.precision}; {e.samples} samples a step"


def _where(e: Sized) -> Iterator[str]:
    speed = f"{e.utilisation:.0%} of {e.accelerator.tflops:g} TFLOP/s"
    yield f"cluster: {_words(e.cluster)}; {e.accelerator.name} at {speed}"
    yield from (f"note: {note}" for note in e.notes)


def _memory(e: Sized) -> Table:
    memory = e.fullest.memory
    title = f"Memory of a process of stage {memory.stage}" + (", the fullest" if len(e.stages) > 1 else "")
    table = Table("", "bytes", "of which", title=title)
    for part, size in memory.resident.items():
        if size:
            table.add_row(part, _bytes(size), "")
    table.add_section()
    table.add_row("all the time", _bytes(sum(memory.resident.values())), "")
    for moment, parts in memory.moments.items():
        table.add_row(f"+ in {moment}", _bytes(sum(parts.values())), _list(parts))
    table.add_section()
    table.add_row("peak", _bytes(memory.peak), f"in {memory.worst}")
    table.add_row(e.accelerator.name, _bytes(e.accelerator.usable_bytes), f"{RESERVED:.0%} are left alone")
    return table


def _step(e: Sized, training: str) -> Table:
    step = e.step
    table = Table("", "computed", "in the node", "between nodes", "seconds", title="A step of the busiest process")
    table.add_row("teacher forward", _flops(step.teacher_flops), *_links(step.gathers), _seconds(step.teacher))
    table.add_row(training, _flops(step.unit_flops), *_links(step.exchange), _seconds(step.units))
    table.add_row("gradient reduction", "", *_links(step.reduction), _seconds(step.reducing))
    table.add_section()
    table.add_row("step", "", "", "", _seconds(step.seconds))
    rate = e.samples / step.seconds
    table.caption = f"{_flops(e.step_flops)} a step over all processes, {rate:.3g} samples/s"
    return table


def _stages(e: Estimate) -> Table:
    table = Table("stage", "units", "parameters", "share", "FLOPs", "peak", title="Stages")
    for number, stage in enumerate(e.stages):
        shares = f"{stage.parameter_share:.1%}", f"{stage.flop_share:.1%}"
        count = _count(stage.parameters)
        table.add_row(str(number), str(len(stage.units)), count, *shares, _bytes(stage.memory.peak))
    return table


def _probing(e: Estimate) -> Table:
    probing = e.probing
    several = f"{probing.passes} pass{'es' if probing.passes > 1 else ''}"
    table = Table("", "", title="Probing")
    table.add_row(f"teacher, {several} over {probing.samples} samples", _flops(probing.teacher_flops))
    table.add_row("moments, float64", _flops(probing.moment_flops))
    table.add_row("probes and chains, float64", _flops(probing.figure_flops))
    table.add_row("minutes", _seconds(probing.seconds / 60))
    table.add_section()
    table.add_row("sums of a process", _bytes(probing.sums))
    table.add_row("boundaries of a micro-batch", _bytes(probing.boundaries))
    table.add_row("file of a --part", _bytes(probing.part))
    return table


def _verdict(e: Sized, section: str) -> Iterator[str]:
    peak, usable = _bytes(e.fullest.memory.peak), _bytes(e.accelerator.usable_bytes)
    yield f"{'fits' if e.fits else 'does not fit'}: {peak} of the {usable} that may be filled ({e.accelerator.name})"
    if e.smallest is not None:
        yield f"smallest cluster that fits: {_words(e.smallest)}"
    else:
        yield (
            f"no cluster of up to 128 such nodes fits; these take less memory: {section}.activation_checkpointing, "
            f"{section}.optimizer.offload, a smaller {section}.micro_batch, a larger teacher.ranks_per_copy"
        )


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


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}"
