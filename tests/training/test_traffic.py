"""Ranks lie where DeepSpeed puts them, and what they move goes over the links that they have between them."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from ppcl_ds.training.traffic import Cluster, Traffic, exchanged, most, passed_on, ring, sent_in_turn

TWO_NODES = Cluster(nodes=2, gpus_per_node=4, stages=2, replicas=4)


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (1, 6), (4, 1), (2, 4), (3, 5)])
def test_stages_and_groups_are_those_of_deepspeeds_topology(stages: int, replicas: int) -> None:
    stock = PipeDataParallelTopology(num_pp=stages, num_dp=replicas)
    cluster = Cluster(1, stages * replicas, stages, replicas)
    for rank in range(cluster.world):
        stage = stock.get_coord(rank).pipe
        assert cluster.stage_of(rank) == stage
        assert rank in cluster.ranks_of(stage)
        assert list(cluster.ranks_of(stage)) in stock.get_axis_comm_lists("data")
        assert list(cluster.pipe_group(rank)) in stock.get_axis_comm_lists("pipe")
        assert rank in cluster.pipe_group(rank)


def test_ranks_fill_one_node_after_the_other() -> None:
    assert [TWO_NODES.node_of(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert TWO_NODES.ranks_near(5) == range(4, 8)


def test_a_ring_stays_in_the_node_where_its_group_does() -> None:
    assert ring(80, 1, range(0, 4), TWO_NODES) == Traffic(intra=60)
    assert ring(80, 1, range(1, 8, 4), TWO_NODES) == Traffic(inter=40)
    assert ring(80, 1, range(0, 8), TWO_NODES) == Traffic(intra=70, inter=70 / 4)
    assert ring(80, 1, range(1, 2), TWO_NODES) == Traffic()


def test_the_exchange_counts_the_fuller_direction_by_link() -> None:
    # Stages 0 and 1 lie on one node, stages 2 and 3 on the other.
    cluster = Cluster(nodes=2, gpus_per_node=2, stages=4, replicas=1)
    messages = [10, 20, 30, 40]
    assert exchanged(0, messages, cluster) == Traffic(intra=20, inter=70)  # receives 10, and 20
    assert exchanged(3, messages, cluster) == Traffic(intra=40, inter=80)  # sends 30, and 30
    assert exchanged(0, [10], Cluster(1, 2, 1, 2)) == Traffic()


def test_senders_that_take_turns_share_the_time_of_all() -> None:
    """Three stages in a node, two of one and one of the other: each message goes once to the others."""
    assert sent_in_turn(0, [10, 20, 40], Cluster(1, 3, 3, 1)) == Traffic(intra=2 * (10 + 20 + 40))
    assert sent_in_turn(1, [10, 20], Cluster(2, 1, 2, 1)) == Traffic(inter=10 + 20)
    assert sent_in_turn(0, [10], Cluster(1, 2, 1, 2)) == Traffic()


def test_a_pipeline_sends_streams_on_and_gradients_back() -> None:
    cluster = Cluster(nodes=2, gpus_per_node=2, stages=4, replicas=1)
    moved = [passed_on(rank, [10, 20, 30], cluster) for rank in range(4)]
    assert moved == [Traffic(intra=10), Traffic(intra=10, inter=20), Traffic(intra=30, inter=20), Traffic(intra=30)]
    assert most(moved).times(2) == Traffic(intra=60, inter=40)
