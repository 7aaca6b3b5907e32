"""How long a step takes, as the sum of its three phases.

A round: the teacher runs on every rank's micro-batch; then the units of each stage train on those of their pipe group.
- Teacher: the slower of its FLOPs and its gathers, which run ahead of it.
- Units: the slower of the fullest stage's FLOPs and its exchange, most of which arrives while the first micro-batches
  are trained on. The next teacher forward waits for the slowest stage, because all ranks gather together.
- Reduction: nothing runs beside it.

Left out: latencies and the speed of small messages, gathers that start too late, norms and other element by element
work, the optimizer's own step, reading data, and everything that happens only now and then (checkpoints, pictures).
All of that is what the utilisation stands for; measure yours with a short run.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from ppcl_ds.estimate.accelerators import Accelerator
from ppcl_ds.estimate.layout import Layout
from ppcl_ds.estimate.measured import Measured
from ppcl_ds.estimate.settings import Settings
from ppcl_ds.estimate.traffic import Traffic, busiest, exchange, gathers, reduction
from ppcl_ds.training.flops import unit_passes


class Step(BaseModel):
    """One optimizer step, on the rank that is slowest in each respect.

    Attributes:
        teacher_flops, unit_flops: what it computes.
        gathers, exchange, reduction: what it moves.
        teacher, units, reducing: seconds of the three phases.
        seconds: of the step.
    """

    model_config = ConfigDict(frozen=True)

    teacher_flops: float
    unit_flops: float
    gathers: Traffic
    exchange: Traffic
    reduction: Traffic
    teacher: float
    units: float
    reducing: float
    seconds: float


def step_of(
    units: Sequence[Sequence[str]],
    layout: Layout,
    run: Measured,
    settings: Settings,
    accelerator: Accelerator,
    *,
    micro_batches: int,
    checkpointing: bool,
    utilisation: float,
) -> Step:
    """Work, traffic and time of a step.

    Args:
        units: for each stage, the names of its units.
        micro_batches: micro-batches in a step, over all ranks; a multiple of the world.
        checkpointing: whether units recompute their activations.
        utilisation: share of the accelerator's peak that matrix products reach.
    """
    rounds = micro_batches // layout.world
    teacher_flops = rounds * run.micro_batch * run.work.teacher
    stage_flops = max(sum(run.work.units[name] for name in names) for names in units) * unit_passes(checkpointing)
    unit_flops = micro_batches // layout.replicas * run.micro_batch * stage_flops
    ranks = range(layout.world)
    messages = [run.message(names) for names in units]
    gathered = busiest([gathers(rank, layout, run, settings) for rank in ranks], accelerator).times(rounds)
    exchanged = busiest([exchange(rank, messages, layout) for rank in ranks], accelerator).times(rounds)
    reduced = busiest([reduction(rank, units, layout, run) for rank in ranks], accelerator)
    rate = accelerator.tflops * 1e12 * utilisation
    teacher = max(teacher_flops / rate, gathered.seconds(accelerator))
    training = max(unit_flops / rate, exchanged.seconds(accelerator))
    reducing = reduced.seconds(accelerator)
    return Step(
        teacher_flops=teacher_flops,
        unit_flops=unit_flops,
        gathers=gathered,
        exchange=exchanged,
        reduction=reduced,
        teacher=teacher,
        units=training,
        reducing=reducing,
        seconds=teacher + training + reducing,
    )
