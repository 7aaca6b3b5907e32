"""Where an estimate's memory and time go, as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ppcl_ds.estimate.accelerators import RESERVED
from ppcl_ds.estimate.numbers import Estimate
from ppcl_ds.estimate.units import computed, counted, lasting, sized
from ppcl_ds.probing.costs import ProbingCosts
from ppcl_ds.training.phases import Parts
from ppcl_ds.training.traffic import Traffic


def show_details(console: Console, estimate: Estimate) -> None:
    """Print memory by phase, stages, phases of a step, the run with and without each lever, and probing."""
    console.print(_memory(estimate))
    console.print(_stages(estimate))
    console.print(_step(estimate))
    if estimate.runs:
        console.print(_runs(estimate))
    if estimate.probing is not None:
        console.print(_probing(estimate.probing, estimate.probing_peak, estimate.probing_seconds))


def _memory(e: Estimate) -> Table:
    memory = e.memory
    title = f"Memory of a process of stage {e.fullest}" + (", the fullest" if len(e.stages) > 1 else "")
    table = Table("", "bytes", "of which", title=title)
    for part, size in memory.resident.items():
        if size:
            table.add_row(part, sized(size), "")
    table.add_section()
    table.add_row("all the time", sized(sum(memory.resident.values())), "")
    for phase, parts in memory.phases.items():
        table.add_row(f"+ in {phase}", sized(sum(parts.values())), _list(parts))
    table.add_section()
    table.add_row("peak", sized(memory.peak), f"in {memory.worst}")
    table.add_row(e.accelerator.name, sized(e.accelerator.usable_bytes), f"{RESERVED:.0%} are left alone")
    if memory.host:
        table.add_section()
        table.add_row("CPU memory of a process", sized(sum(memory.host.values())), _list(memory.host))
    return table


def _stages(e: Estimate) -> Table:
    table = Table("stage", "layers", "parameters", "share", "FLOPs", "peak", title="Stages")
    for number, stage in enumerate(e.stages):
        shares = f"{stage.parameter_share:.1%}", f"{stage.flop_share:.1%}"
        count = counted(stage.parameters)
        table.add_row(str(number), str(len(stage.layers)), count, *shares, sized(stage.memory.peak))
    return table


def _step(e: Estimate) -> Table:
    table = Table("", "computed", "in the node", "between nodes", "at least", title="A step of the busiest process")
    for phase in e.step:
        if phase.flops or phase.seconds:
            flops = computed(phase.flops) if phase.flops else ""
            table.add_row(phase.name, flops, *_links(phase.moved), lasting(phase.seconds))
    waits = [f"\na stage waits {phase.waits:.0%} of the {phase.name}'s time" for phase in e.step if phase.waits]
    table.caption = f"{computed(e.step_flops)} a step over all processes" + "".join(waits)
    return table


def _runs(e: Estimate) -> Table:
    table = Table("", "teacher forwards", "computed", "accelerator time", "of this", title="The whole distillation")
    first = e.runs[0]
    for run in e.runs:
        share = f"{run.flops / first.flops:.0%}"
        table.add_row(run.name, counted(run.forwards), computed(run.flops), lasting(run.hours * 3600), share)
    return table


def _probing(probing: ProbingCosts, peak: int, seconds: float) -> Table:
    several = f"{probing.passes} pass{'es' if probing.passes > 1 else ''}"
    table = Table("", "", title="Probing")
    table.add_row("sums of a process", sized(probing.sums))
    table.add_row("boundaries of a micro-batch", sized(probing.boundaries))
    table.add_row("peak, with the teacher", sized(peak))
    table.add_row("file of a --part", sized(probing.part))
    table.add_section()
    table.add_row(f"teacher, {several} over {probing.samples} samples", computed(probing.teacher_flops))
    table.add_row("moments, float64", computed(probing.moment_flops))
    table.add_row("probes and chains, float64", computed(probing.figure_flops))
    table.add_row("at least", lasting(seconds))
    return table


def _list(parts: Parts) -> str:
    return ", ".join(f"{part} {sized(size)}" for part, size in parts.items() if size)


def _links(traffic: Traffic) -> tuple[str, str]:
    return (sized(traffic.intra) if traffic.intra else "", sized(traffic.inter) if traffic.inter else "")
