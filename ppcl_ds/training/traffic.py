"""Where the processes of a run lie on a cluster, and the bytes that they move over its links.

Collectives are taken to move what ring algorithms move: over the links inside a node every byte once, and into a node
every byte once, over the network links of all its members together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """World = nodes x GPUs per node = stages x replicas, one process per accelerator.

    Ranks fill one node after the other, and one stage after the other, as DeepSpeed's `PipeDataParallelTopology`
    numbers them: the replicas of a stage are neighbours, the stages of a pipe group lie `replicas` ranks apart.
    """

    nodes: int
    gpus_per_node: int
    stages: int
    replicas: int

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    def stage_of(self, rank: int) -> int:
        return rank // self.replicas

    def ranks_of(self, stage: int) -> range:
        return range(stage * self.replicas, (stage + 1) * self.replicas)

    def pipe_group(self, rank: int) -> range:
        """The ranks that exchange with a rank, one a stage, in the order of the stages."""
        return range(rank % self.replicas, self.world, self.replicas)

    def node_of(self, rank: int) -> int:
        return rank // self.gpus_per_node

    def ranks_near(self, rank: int) -> range:
        first = self.node_of(rank) * self.gpus_per_node
        return range(first, first + self.gpus_per_node)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one process.

    Attributes:
        intra: over links inside its node.
        inter: over its share of the node's network.
    """

    intra: float = 0.0
    inter: float = 0.0

    def times(self, factor: float) -> Traffic:
        return Traffic(self.intra * factor, self.inter * factor)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.intra + other.intra, self.inter + other.inter)


def most(moved: Iterable[Traffic]) -> Traffic:
    """The most that any of several processes moves over either kind of link."""
    each = list(moved)
    return Traffic(max(traffic.intra for traffic in each), max(traffic.inter for traffic in each))


def ring(size: float, rank: int, group: range, cluster: Cluster) -> Traffic:
    """One rank's traffic when `size` bytes are gathered, all ranks' parts together; a reduce-scatter moves the same."""
    moved = size * (len(group) - 1) / len(group)
    near = sum(other in group for other in cluster.ranks_near(rank))
    if near == len(group):
        return Traffic(intra=moved)
    if near == 1:
        return Traffic(inter=moved)
    return Traffic(intra=moved, inter=moved / near)


def exchanged(rank: int, messages: Sequence[int], cluster: Cluster) -> Traffic:
    """One round of `exchange.py`: to each other stage what it reads of this rank's micro-batch, and from each what this
    stage reads of its micro-batch. Of the two directions, which do not disturb each other, the fuller one counts.

    Args:
        messages: for each stage, bytes that it reads of one micro-batch.
    """
    sent, received = {True: 0, False: 0}, {True: 0, False: 0}
    for stage, other in enumerate(cluster.pipe_group(rank)):
        if other != rank:
            near = other in cluster.ranks_near(rank)
            sent[near] += messages[stage]
            received[near] += messages[cluster.stage_of(rank)]
    return Traffic(intra=max(sent[True], received[True]), inter=max(sent[False], received[False]))


def sent_in_turn(rank: int, messages: Sequence[int], cluster: Cluster) -> Traffic:
    """The same round where one rank of the pipe group sends after the other: what all of them send."""
    total = Traffic()
    for sender in cluster.pipe_group(rank):
        for stage, other in enumerate(cluster.pipe_group(rank)):
            if other != sender:
                near = other in cluster.ranks_near(sender)
                total += Traffic(intra=messages[stage]) if near else Traffic(inter=messages[stage])
    return total


def passed_on(rank: int, edges: Sequence[int], cluster: Cluster) -> Traffic:
    """One micro-batch of 1F1B: streams to the next stage, gradients to the one before; as much comes back.

    Args:
        edges: for each stage but the first, bytes of the streams that enter it from the one before.
    """
    moved = {True: 0, False: 0}
    pipe, stage = cluster.pipe_group(rank), cluster.stage_of(rank)
    for other, edge in ((stage - 1, stage - 1), (stage + 1, stage)):
        if 0 <= other < cluster.stages:
            moved[pipe[other] in cluster.ranks_near(rank)] += edges[edge]
    return Traffic(intra=moved[True], inter=moved[False])
