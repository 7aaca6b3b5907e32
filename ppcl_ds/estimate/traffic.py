"""Bytes that a process moves in one optimizer step, by the kind of link that they take.

Collectives are taken to move what ring algorithms move: over the links inside a node every byte once, and into a node
every byte once, over the network links of all its members together.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from ppcl_ds.estimate.accelerators import Accelerator
from ppcl_ds.estimate.layout import Layout
from ppcl_ds.estimate.measured import Measured
from ppcl_ds.estimate.settings import Settings


class Traffic(BaseModel):
    """Bytes of one process in one step.

    Attributes:
        intra: over links inside the node.
        inter: over its share of the node's network.
    """

    model_config = ConfigDict(frozen=True)

    intra: float = 0.0
    inter: float = 0.0

    def times(self, factor: float) -> Traffic:
        """The same, `factor` times."""
        return Traffic(intra=self.intra * factor, inter=self.inter * factor)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(intra=self.intra + other.intra, inter=self.inter + other.inter)

    def seconds(self, accelerator: Accelerator) -> float:
        """Time at the links' full bandwidth; both kinds of link work at once."""
        return max(self.intra / accelerator.intra_gb, self.inter / accelerator.inter_gb) / 1e9


def busiest(moved: Sequence[Traffic], accelerator: Accelerator) -> Traffic:
    """The traffic that takes longest."""
    return max(moved, key=lambda traffic: traffic.seconds(accelerator))


def ring(size: float, rank: int, group: range, layout: Layout) -> Traffic:
    """One rank's traffic when `size` bytes are gathered, all ranks' parts together; a reduce-scatter moves the same."""
    moved = size * (len(group) - 1) / len(group)
    neighbours = sum(layout.node_of(other) == layout.node_of(rank) for other in group)
    if neighbours == len(group):
        return Traffic(intra=moved)
    if neighbours == 1:
        return Traffic(inter=moved)
    return Traffic(intra=moved, inter=moved / neighbours)


def gathers(rank: int, layout: Layout, run: Measured, settings: Settings) -> Traffic:
    """One teacher forward: all parameters up to the last block that a unit needs, but those that are always whole."""
    size = sum(elements * size for elements, size in run.used if elements > settings.persistent)
    return ring(size, rank, settings.gather_group(rank, layout), layout)


def exchange(rank: int, messages: Sequence[int], layout: Layout) -> Traffic:
    """One round inside the pipe group: to each other stage what its units read of this rank's micro-batch, and from
    each what this stage's units read of its micro-batch. Of the two directions, which do not disturb each other, the
    fuller one counts.

    Args:
        messages: for each stage, bytes that its units read of one micro-batch.
    """
    sent, received = {True: 0, False: 0}, {True: 0, False: 0}
    for stage, other in enumerate(layout.pipe_group(rank)):
        if other != rank:
            near = layout.node_of(other) == layout.node_of(rank)
            sent[near] += messages[stage]
            received[near] += messages[layout.stage_of(rank)]
    return Traffic(intra=max(sent[True], received[True]), inter=max(sent[False], received[False]))


def reduction(rank: int, units: Sequence[Sequence[str]], layout: Layout, run: Measured) -> Traffic:
    """The end of a step: gradients are averaged over the replicas in float32 (reduce-scatter and all-gather), each
    replica steps its share, and the new parameters are gathered.
    """
    parameters = sum(run.unit_parameters[name] for name in units[layout.stage_of(rank)])
    size = parameters * (2 * 4 + run.element)
    return ring(size, rank, layout.data_group(rank), layout)
