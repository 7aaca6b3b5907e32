"""What an estimate is made of: a recipe's teacher, plan and samples, on a cluster. No weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ppcl_ds.data.batch import Size
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.assumed import assume_plan
from ppcl_ds.estimate.seen import Seen, look
from ppcl_ds.recipe import Recipe, teacher_config
from ppcl_ds.sections import Topology, Training
from ppcl_ds.teacher.encoding import largest
from ppcl_ds.teacher.gathering import with_gathering
from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.teacher.teacher import Teacher, open_teacher
from ppcl_ds.training.phases import Sharding
from ppcl_ds.training.traffic import Cluster
from ppcl_ds.units.plan import Plan, load_plan


@dataclass(frozen=True)
class Inputs:
    """A recipe on a cluster.

    Attributes:
        variant: that is fine-tuned; None: the library is distilled.
        teacher: weights are not needed.
        plan: the run's, or what stands in for it.
        source: where the plan comes from, in words.
        size: of a sample.
        seen: what encoded shards say of the samples; None: there are none.
    """

    recipe: Recipe
    variant: str | None
    cluster: Cluster
    teacher: Teacher
    plan: Plan
    source: str
    size: Size
    sharding: Sharding
    seen: Seen | None = None

    @property
    def training(self) -> Training:
        """The recipe's section of the training that is asked about."""
        return self.recipe.tuning if self.variant else self.recipe.distill

    @property
    def dtype(self) -> torch.dtype:
        """Of teacher and students while they run."""
        return DTYPES[self.recipe.teacher.precision]


def read_inputs(
    recipe: Recipe,
    nodes: int,
    gpus_per_node: int,
    variant: str | None = None,
    size: Size | None = None,
    teacher: Teacher | None = None,
) -> Inputs:
    """Everything that an estimate needs.

    Args:
        variant: that is to be fine-tuned; None: the library is to be distilled.
        size: of a sample; by default the largest that is encoded, else that the recipe names.
        teacher: the recipe's, if it is open already.

    Raises:
        UserError: recipe, plan, teacher and cluster do not go together; the message says which.
    """
    cluster = cluster_for(recipe.topology, nodes, gpus_per_node)
    teacher = teacher or open_teacher(recipe, weights=False)
    if recipe.plan_file.exists():
        plan, source = load_plan(recipe.plan_file, teacher), str(recipe.plan_file)
    elif recipe.plan.rule == "given" and recipe.plan.given:
        plan, source = load_plan(recipe.plan.given, teacher), str(recipe.plan.given)
    else:
        shares = {name: share for name, share in recipe.plan.variants.items() if variant in (None, name)}
        if not shares:
            raise UserError(f"variant '{variant}' is not in plan.variants: {', '.join(recipe.plan.variants)}")
        plan, source = assume_plan(shares, teacher), f"assumed, as there is no {recipe.plan_file}"
    sharding = sharding_of(recipe, teacher, gpus_per_node)
    if cluster.world % sharding.ranks_per_copy:
        raise UserError(
            f"teacher.ranks_per_copy is {sharding.ranks_per_copy}, which does not divide the {cluster.world} processes"
        )
    seen = look(recipe.data)
    size = size or (seen.size if seen else largest(recipe.data, teacher.call))
    return Inputs(recipe, variant, cluster, teacher, plan, source, size, sharding, seen)


def cluster_for(topology: Topology, nodes: int, gpus_per_node: int) -> Cluster:
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
            f"does not divide; set it to {' or '.join(map(str, _near(topology.stages, world)))}, or change the cluster"
        )
    return Cluster(nodes, gpus_per_node, topology.stages, world // topology.stages)


def _near(stages: int, world: int) -> list[int]:
    """The next numbers of stages, down and up, that divide the processes."""
    divide = [number for number in range(1, world + 1) if world % number == 0]
    return [*[max(n for n in divide if n < stages)], *[n for n in divide if n > stages][:1]]


def growing_clusters(topology: Topology, gpus_per_node: int, layers: int, most: int) -> Iterator[Cluster]:
    """1, 2, 3, ... GPUs of one node, then 2, 4, 8, ... whole nodes up to `most`; on each, see `shapes`."""
    for gpus in range(1, gpus_per_node + 1):
        yield from shapes(topology, 1, gpus, layers)
    nodes = 2
    while nodes <= most:
        yield from shapes(topology, nodes, gpus_per_node, layers)
        nodes *= 2


def shapes(topology: Topology, nodes: int, gpus_per_node: int, layers: int) -> Iterator[Cluster]:
    """A cluster in every number of stages that divides it, those like the recipe's first.

    Args:
        layers: what is laid over the stages; there are never more stages.
    """
    world = nodes * gpus_per_node
    divide = [stages for stages in range(1, min(world, layers) + 1) if world % stages == 0]
    for stages in sorted(divide, key=lambda s: max(s / topology.stages, topology.stages / s)):
        yield Cluster(nodes, gpus_per_node, stages, world // stages)


def sharding_of(recipe: Recipe, teacher: Teacher, gpus_per_node: int) -> Sharding:
    """From recipe and the teacher's DeepSpeed file; gathers are sized to the teacher, the rest is DeepSpeed's.

    Raises:
        UserError: the file cannot be read.
    """
    zero = with_gathering(teacher_config(recipe), teacher)["zero_optimization"]
    offload = zero.get("offload_param") or {}
    return Sharding(
        ranks_per_copy=recipe.teacher.ranks_per_copy or gpus_per_node,
        max_live=int(zero["stage3_max_live_parameters"]),
        prefetch=int(zero["stage3_prefetch_bucket_size"]),
        persistent=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        whole=recipe.teacher.ranks_per_copy == 1,
        offload=offload.get("device", "none") != "none",
        pinned=bool(offload.get("pin_memory")),
    )
