"""The numbers of an estimate, added up from a training's phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from ppcl_ds.data.batch import Size
from ppcl_ds.estimate.accelerators import Accelerator
from ppcl_ds.probing.costs import ProbingCosts
from ppcl_ds.training.phases import Parts, Phase
from ppcl_ds.training.traffic import Cluster, Traffic, most


class Numbers(BaseModel):
    """Base of the parts of an estimate."""

    model_config = ConfigDict(frozen=True)


class Memory(Numbers):
    """Memory of a process, in bytes.

    Attributes:
        resident: parts that are there all the time.
        phases: phase of a step -> parts on top.
        worst: the phase that takes most.
        peak: resident parts and those of the worst phase.
        host: pinned CPU memory.
    """

    resident: Parts
    phases: dict[str, Parts]
    worst: str
    peak: int
    host: Parts = {}


class Stage(Numbers):
    """One pipeline stage.

    Attributes:
        layers: names of its units, or of its blocks.
        parameters: of those.
        parameter_share, flop_share: its part of all stages' parameters and work.
        memory: of one of its processes.
    """

    layers: tuple[str, ...]
    parameters: int
    parameter_share: float
    flop_share: float
    memory: Memory


class Bound(Numbers):
    """What a phase of a step takes at least.

    Attributes:
        name: of the phase.
        flops: the most that any process computes.
        moved: bytes, the most that any process moves over either kind of link.
        waits: share of its time in which the process with most work waits for other stages.
        seconds: the slower of both at the accelerator's rates.
    """

    name: str
    flops: float
    moved: Traffic
    waits: float
    seconds: float


class WholeRun(Numbers):
    """A distillation from its first step to its last.

    Attributes:
        name: in words.
        forwards: of the teacher, samples.
        flops: of everything.
        hours: of one accelerator, at least.
    """

    name: str
    forwards: float
    flops: float
    hours: float


class Layout(Numbers):
    """One that holds a training, and the least that its step takes."""

    stages: int
    replicas: int
    seconds: float


class RoadStep(Numbers):
    """A step of the road.

    Attributes:
        name: its command.
        work: what it goes through, in words.
        flops: matrix products, convolutions and attention, all of them.
        seconds: at least.
        accelerators: that work at a time.
        cost: of them, in whatever the price was in; None: nobody named a price.
    """

    name: str
    work: str
    flops: float
    seconds: float
    accelerators: int
    cost: float | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accelerator_hours(self) -> float:
        return self.seconds * self.accelerators / 3600


class Estimate(Numbers):
    """What a training needs on a cluster, and whether the cluster has it.

    Attributes:
        training: which one.
        variant: that is fine-tuned.
        teacher: its class name.
        teacher_parameters: how many it has.
        plan: where the units come from, in words.
        parameters: of all units together, or of the variant.
        sample: its size.
        tokens: of each stream that enters the first block.
        precision: dtype of teacher and students while they run.
        cluster: the one asked about.
        accelerator: the one in it.
        accelerator_from: how that is known, if nobody said it.
        samples_from: where size and captions come from, in words.
        notes: where the estimate departs from the recipe.
        stages: in order.
        trains: whether the fullest stage fits.
        smallest: the cluster of fewest accelerators that the run fits on: 1, 2, 3, ... of a node, then 2, 4, 8, ...
            nodes; None if 128 nodes are too few.
        layouts: of the cluster asked about that hold the training; those like the recipe's first.
        instead: where none of them does, lines of a recipe that would.
        micro_batches: in a step; if the recipe's do not fill the cluster, the next number that does.
        samples: in a step.
        step_flops: FLOPs of a step, over all processes.
        utilisation: share of the accelerator's peak that matrix products are taken to reach.
        step: phase by phase.
        seconds: of a step, at least.
        runs: the whole distillation, and what it would cost otherwise; none for fine-tuning.
        probing: what `ppcl probe` needs; None for fine-tuning.
        probing_peak: bytes of a process that probes, the teacher among them.
        probing_seconds: of it on this cluster, at least; communication is left out.
        road: every step of the road; empty where a training alone was asked about.
        disk: bytes of what the road writes, by name; likewise.
    """

    training: Literal["distill", "finetune"]
    variant: str | None
    teacher: str
    teacher_parameters: int
    plan: str
    parameters: int
    sample: Size
    tokens: dict[str, int]
    precision: str
    cluster: Cluster
    accelerator: Accelerator
    accelerator_from: str
    samples_from: str
    notes: tuple[str, ...]
    stages: tuple[Stage, ...]
    trains: bool
    smallest: Cluster | None
    layouts: tuple[Layout, ...]
    micro_batches: int
    samples: int
    step_flops: float
    utilisation: float
    step: tuple[Bound, ...]
    seconds: float
    runs: tuple[WholeRun, ...]
    probing: ProbingCosts | None
    probing_peak: int
    probing_seconds: float
    road: tuple[RoadStep, ...] = ()
    disk: dict[str, int] = {}
    instead: tuple[str, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fits(self) -> bool:
        """Whether training and, before it, probing do."""
        return self.trains and self.probing_peak <= self.accelerator.usable_bytes

    @property
    def fullest(self) -> int:
        """The stage whose processes need most memory."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].memory.peak)

    @property
    def memory(self) -> Memory:
        return self.stages[self.fullest].memory

    @property
    def host(self) -> int:
        """Bytes of pinned CPU memory on a node, at most."""
        return self.cluster.gpus_per_node * max(sum(stage.memory.host.values()) for stage in self.stages)


def add_up(phases: Sequence[Phase]) -> Memory:
    """The memory of a process: what any phase keeps, and the phase that takes most on top."""
    resident = {part: size for phase in phases for part, size in phase.resident.items()}
    on_top = {phase.name: phase.transient for phase in phases if phase.transient}
    worst = max(on_top, key=lambda name: sum(on_top[name].values()))
    peak = sum(resident.values()) + sum(on_top[worst].values())
    host = {part: size for phase in phases for part, size in phase.host.items()}
    return Memory(resident=resident, phases=on_top, worst=worst, peak=peak, host=host)


def least_time(
    stages: Sequence[Sequence[Phase]], accelerator: Accelerator, utilisation: float
) -> tuple[tuple[Bound, ...], float]:
    """A lower bound of a step's time: arithmetic and traffic at the accelerator's rates, and nothing else.

    Left out are latencies and the speed of small messages, gathers that start too late, norms and other element by
    element work, the optimizer's own step, reading data, and what happens only now and then (checkpoints, previews).

    Args:
        stages: for each stage, its phases; the same ones on all.
        utilisation: share of the accelerator's peak that matrix products reach.

    Returns:
        The phases, and the seconds of a step.
    """
    bounds, total, beside = [], 0.0, 0.0
    for phase in zip(*stages, strict=True):
        fullest = max(phase, key=lambda own: own.flops)
        moved, in_turn = most(own.moved for own in phase), most(own.in_turn for own in phase)
        computing = fullest.flops / (accelerator.tflops * 1e12 * utilisation) / (1 - fullest.waits)
        seconds = max(computing, seconds_of(moved, accelerator), seconds_of(in_turn, accelerator))
        bounds.append(Bound(name=fullest.name, flops=fullest.flops, moved=moved, waits=fullest.waits, seconds=seconds))
        if fullest.beside_next:
            beside = seconds
        else:
            total, beside = total + max(seconds, beside), 0.0
    return tuple(bounds), total


def seconds_of(moved: Traffic, accelerator: Accelerator) -> float:
    """Time at the links' full bandwidth; both kinds of link work at once."""
    return max(moved.intra / accelerator.intra_gb, moved.inter / accelerator.inter_gb) / 1e9
