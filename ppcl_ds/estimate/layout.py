"""How the processes of a run lie on a cluster: nodes, stages, replicas, and which stage holds which units."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from ppcl_ds.errors import UserError
from ppcl_ds.sections import Topology


@dataclass(frozen=True)
class Layout:
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
        """Number of processes."""
        return self.nodes * self.gpus_per_node

    def stage_of(self, rank: int) -> int:
        """The stage whose units a rank trains."""
        return rank // self.replicas

    def node_of(self, rank: int) -> int:
        """The node that a rank runs on."""
        return rank // self.gpus_per_node

    def data_group(self, rank: int) -> range:
        """The replicas of a rank's stage."""
        first = self.stage_of(rank) * self.replicas
        return range(first, first + self.replicas)

    def pipe_group(self, rank: int) -> range:
        """The ranks that exchange with a rank, one a stage, in the order of the stages."""
        return range(rank % self.replicas, self.world, self.replicas)

    def copy_group(self, rank: int, ranks_per_copy: int) -> range:
        """The ranks that hold a copy of the teacher between them."""
        first = rank // ranks_per_copy * ranks_per_copy
        return range(first, first + ranks_per_copy)


def layout_on(topology: Topology, nodes: int, gpus_per_node: int) -> Layout:
    """The recipe's topology on a cluster; where that has more or fewer processes, stages stay and replicas change.

    Raises:
        UserError: the stages do not divide the processes.
    """
    world = nodes * gpus_per_node
    if min(nodes, gpus_per_node) < 1:
        raise UserError(f"--nodes {nodes} --gpus-per-node {gpus_per_node}: both must be at least 1")
    if world % topology.stages:
        raise UserError(
            f"{nodes} nodes x {gpus_per_node} GPUs are {world} processes, which topology.stages ({topology.stages}) "
            "does not divide; change one of them"
        )
    return Layout(nodes, gpus_per_node, topology.stages, world // topology.stages)


def layouts_of_growing_clusters(topology: Topology, gpus_per_node: int, units: int, most: int) -> Iterator[Layout]:
    """Layouts on 1, 2, 4, ... nodes up to `most`; on each, numbers of stages like the recipe's come first.

    Args:
        units: size of the library; there are never more stages than units.
    """
    nodes = 1
    while nodes <= most:
        world = nodes * gpus_per_node
        shapes = [stages for stages in range(1, min(world, units) + 1) if world % stages == 0]
        for stages in sorted(shapes, key=lambda s: max(s / topology.stages, topology.stages / s)):
            yield Layout(nodes, gpus_per_node, stages, world // stages)
        nodes *= 2


def units_by_stage(costs: Mapping[str, float], stages: int) -> list[list[str]]:
    """Lay units over stages as `distill.library.Library` does: neighbours of about equal cost.

    Args:
        costs: unit -> its FLOPs, in the order of the plan.

    Raises:
        UserError: there are more stages than units.
    """
    if stages > len(costs):
        raise UserError(
            f"topology.stages is {stages}, but the plan has only {len(costs)} units; use at most one stage a unit"
        )
    names = list(costs)
    bounds = balanced_bounds(tuple(map(int, costs.values())), stages)
    return [names[a:b] for a, b in pairwise(bounds)]


@lru_cache
def balanced_bounds(costs: tuple[int, ...], stages: int) -> list[int]:
    """First item of each stage, and behind them the number of items, as DeepSpeed cuts: stages of about equal cost."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # DeepSpeed warns that this machine has no accelerator; nobody needs one here
    try:
        from deepspeed.runtime.utils import partition_balanced
    finally:
        logging.disable(before)
    return [int(bound) for bound in partition_balanced(list(costs), stages)]


def stage_bounds(joined: Sequence[bool], costs: Sequence[float], stages: int) -> list[int]:
    """First block of each stage of a variant, and behind them the number of blocks: neighbours of about equal cost.

    Args:
        joined: for each block, whether it has to stay with the one before.
        costs: of each block, in any unit.

    Raises:
        UserError: there are more stages than can be cut.
    """
    starts = [place for place, stays in enumerate(joined) if not stays]
    if stages > len(starts):
        text = "; blocks with linear text stay with the one whose text they read" if any(joined) else ""
        raise UserError(
            f"topology.stages is {stages}, but the variant's {len(joined)} blocks can be cut into {len(starts)} stages "
            f"at most{text}"
        )
    edges = [*starts, len(joined)]
    groups = tuple(int(sum(costs[a:b])) for a, b in pairwise(edges))
    return [edges[bound] for bound in balanced_bounds(groups, stages)]
