"""What an estimate is made of: a recipe's teacher, plan and samples, on a cluster. No weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ppcl_ds.data.noising import DTYPES
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.assumed import assume_plan
from ppcl_ds.recipe import Recipe, read_deepspeed_file
from ppcl_ds.sections import Topology, Training
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.meta_forward import latent_channels
from ppcl_ds.training.phases import Sharding
from ppcl_ds.training.traffic import Cluster
from ppcl_ds.units.plan import Plan, load_plan

_TEXT_TOKENS = 32
"""Tokens of a prompt where the recipe does not say: captions of a sentence or two."""


@dataclass(frozen=True)
class Inputs:
    """A recipe on a cluster.

    Attributes:
        variant: that is fine-tuned; None: the library is distilled.
        teacher: weights are not needed.
        plan: the run's, or what stands in for it.
        source: where the plan comes from, in words.
        latents: (C, H, W) of a sample.
        tokens: of its prompt.
    """

    recipe: Recipe
    variant: str | None
    cluster: Cluster
    teacher: Teacher
    plan: Plan
    source: str
    latents: tuple[int, int, int]
    tokens: int
    sharding: Sharding

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
    latent_size: tuple[int, int] | None = None,
    text_tokens: int | None = None,
    teacher: Teacher | None = None,
) -> Inputs:
    """Everything that an estimate needs.

    Args:
        variant: that is to be fine-tuned; None: the library is to be distilled.
        latent_size: H and W of a sample; the recipe's by default.
        text_tokens: tokens of its prompt; the recipe's by default.
        teacher: the recipe's, if it is open already.

    Raises:
        UserError: recipe, plan, teacher and cluster do not go together; the message says which.
    """
    cluster = cluster_for(recipe.topology, nodes, gpus_per_node)
    teacher = teacher or Teacher(recipe.teacher.path, weights=False)
    if recipe.plan_file.exists():
        plan, source = load_plan(recipe.plan_file, teacher), str(recipe.plan_file)
    elif recipe.plan.rule == "given" and recipe.plan.given:
        plan, source = load_plan(recipe.plan.given, teacher), str(recipe.plan.given)
    else:
        shares = {name: share for name, share in recipe.plan.variants.items() if variant in (None, name)}
        if not shares:
            raise UserError(f"variant '{variant}' is not in plan.variants: {', '.join(recipe.plan.variants)}")
        plan, source = assume_plan(shares, teacher), f"assumed, as there is no {recipe.plan_file}"
    sharding = sharding_of(recipe, gpus_per_node)
    if cluster.world % sharding.ranks_per_copy:
        raise UserError(
            f"teacher.ranks_per_copy is {sharding.ranks_per_copy}, which does not divide the {cluster.world} processes"
        )
    side = recipe.data.images.latent_size
    latents = (latent_channels(teacher.empty), *(latent_size or (side, side)))
    tokens = text_tokens or recipe.data.captions.max_tokens or _TEXT_TOKENS
    return Inputs(recipe, variant, cluster, teacher, plan, source, latents, tokens, sharding)


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
            "does not divide; change one of them"
        )
    return Cluster(nodes, gpus_per_node, topology.stages, world // topology.stages)


def growing_clusters(topology: Topology, gpus_per_node: int, layers: int, most: int) -> Iterator[Cluster]:
    """Clusters of 1, 2, 4, ... nodes up to `most`; on each, numbers of stages like the recipe's come first.

    Args:
        layers: what is laid over the stages; there are never more stages.
    """
    nodes = 1
    while nodes <= most:
        world = nodes * gpus_per_node
        shapes = [stages for stages in range(1, min(world, layers) + 1) if world % stages == 0]
        for stages in sorted(shapes, key=lambda s: max(s / topology.stages, topology.stages / s)):
            yield Cluster(nodes, gpus_per_node, stages, world // stages)
        nodes *= 2


def sharding_of(recipe: Recipe, gpus_per_node: int) -> Sharding:
    """From recipe and the teacher's DeepSpeed file; what that leaves out has DeepSpeed's defaults.

    Raises:
        UserError: the file cannot be read.
    """
    zero = read_deepspeed_file(recipe.deepspeed.teacher).get("zero_optimization", {})
    return Sharding(
        ranks_per_copy=recipe.teacher.ranks_per_copy or gpus_per_node,
        max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        persistent=int(zero.get("stage3_param_persistence_threshold", 1e5)),
    )
