"""How a training can be laid over processes: the smallest cluster that holds it, the fastest layout of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ppcl_ds.estimate.accelerators import Accelerator
from ppcl_ds.estimate.inputs import Inputs, growing_clusters, shapes
from ppcl_ds.estimate.measured import account_of, run_once
from ppcl_ds.estimate.numbers import Layout, Memory, add_up, least_time
from ppcl_ds.training.phases import Account
from ppcl_ds.training.traffic import Cluster

_MOST_NODES = 128
"""Largest cluster that is searched for one that is large enough."""


def fits(memories: Sequence[Memory], accelerator: Accelerator) -> bool:
    """Whether the fullest stage does."""
    return max(memory.peak for memory in memories) <= accelerator.usable_bytes


def has_room(account: Account, cluster: Cluster, accelerator: Accelerator) -> bool:
    """Whether a cluster holds a training."""
    return fits([add_up(stage) for stage in account.phases(cluster)], accelerator)


def smallest(inputs: Inputs, account: Account, accelerator: Accelerator, node: int) -> Cluster | None:
    """The cluster of fewest accelerators that holds a training, in the recipe's number of stages if that does.

    Args:
        node: accelerators of a node.
    """
    for cluster in growing_clusters(inputs.recipe.topology, node, _cuts(account), _MOST_NODES):
        own = _on(inputs, account, cluster)
        if own and has_room(own, cluster, accelerator):
            return cluster
    return None


def layouts(inputs: Inputs, account: Account, accelerator: Accelerator, utilisation: float) -> Iterator[Layout]:
    """Those of the cluster that is asked about that hold the training, in numbers of stages like the recipe's first."""
    asked = inputs.cluster
    for cluster in shapes(inputs.recipe.topology, asked.nodes, asked.gpus_per_node, _cuts(account)):
        phases = account.phases(cluster)
        if fits([add_up(stage) for stage in phases], accelerator):
            _, seconds = least_time(phases, accelerator, utilisation)
            yield Layout(stages=cluster.stages, replicas=cluster.replicas, seconds=seconds)


def instead(inputs: Inputs, accelerator: Accelerator, utilisation: float) -> tuple[str, ...]:
    """Lines of a recipe under which the cluster holds a training that it does not hold as it is: the least change.

    None if it holds it in no way. A micro-batch of one is tried first, then checkpointing, then masters and moments in
    CPU memory; the samples of a step stay.
    """
    settings, name = inputs.training, "finetune" if inputs.variant else "distill"
    world = inputs.cluster.world
    rounds = -(-settings.micro_batches_per_step * settings.micro_batch // world) * world
    smaller = {"micro_batch": 1, "micro_batches_per_step": rounds}
    offloaded = {"optimizer": settings.optimizer.model_copy(update={"offload": True})}
    for more in ({}, {"activation_checkpointing": True}, {"activation_checkpointing": True} | offloaded):
        changed = settings.model_copy(update=smaller | more)
        asked = replace(inputs, recipe=inputs.recipe.model_copy(update={name: changed}))
        account = account_of(asked, run_once(asked))
        if found := list(layouts(asked, account, accelerator, utilisation)):
            best = min(found, key=lambda layout: layout.seconds)
            lines = [f"topology: {{stages: {best.stages}, replicas: {best.replicas}}}"]
            lines += [f"{key}: {value}  # in {name}" for key, value in smaller.items()]
            lines += [f"activation_checkpointing: true  # in {name}"] if changed.activation_checkpointing else []
            return (*lines, *([f"offload: true  # in {name}.optimizer"] if changed.optimizer.offload else []))
    return ()


def _cuts(account: Account) -> int:
    return sum(not layer.joined for layer in account.layers)


def _on(inputs: Inputs, account: Account, cluster: Cluster) -> Account | None:
    """The account on another cluster, where a copy of the teacher is as large as its nodes unless the recipe says."""
    told = inputs.recipe.teacher.ranks_per_copy
    if told and cluster.world % told:
        return None
    sharding = replace(account.teacher.sharding, ranks_per_copy=told or cluster.gpus_per_node)
    return replace(account, teacher=replace(account.teacher, sharding=sharding))
