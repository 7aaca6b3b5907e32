"""Where ranks and units lie is what DeepSpeed makes of it."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from hypothesis import given
from hypothesis import strategies as st

from ppcl_ds.errors import UserError
from ppcl_ds.estimate.layout import Layout, layout_on, layouts_of_growing_clusters, units_by_stage
from ppcl_ds.sections import Topology


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (1, 6), (4, 1), (2, 4), (3, 5)])
def test_stages_and_groups_are_those_of_deepspeeds_topology(stages: int, replicas: int) -> None:
    stock = PipeDataParallelTopology(num_pp=stages, num_dp=replicas)
    layout = Layout(1, stages * replicas, stages, replicas)
    for rank in range(layout.world):
        assert layout.stage_of(rank) == stock.get_coord(rank).pipe
        assert list(layout.pipe_group(rank)) in stock.get_axis_comm_lists("pipe")
        assert list(layout.data_group(rank)) in stock.get_axis_comm_lists("data")
        assert rank in layout.pipe_group(rank)
        assert rank in layout.data_group(rank)


def test_ranks_fill_one_node_after_the_other() -> None:
    layout = Layout(nodes=2, gpus_per_node=4, stages=2, replicas=4)
    assert [layout.node_of(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert layout.copy_group(5, ranks_per_copy=4) == range(4, 8)


def test_another_number_of_processes_changes_the_replicas() -> None:
    recipe = Topology(stages=4, replicas=2)
    assert layout_on(recipe, 1, 8) == Layout(1, 8, 4, 2)
    assert layout_on(recipe, 4, 8) == Layout(4, 8, 4, 8)


@pytest.mark.parametrize(("nodes", "gpus", "words"), [(1, 6, "does not divide"), (0, 8, "at least 1")])
def test_a_cluster_that_does_not_suit_the_stages_is_refused(nodes: int, gpus: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        layout_on(Topology(stages=4, replicas=2), nodes, gpus)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.data())
def test_every_unit_is_on_one_stage_and_no_stage_is_idle(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    spread = units_by_stage({str(place): cost for place, cost in enumerate(costs)}, stages)
    assert [name for names in spread for name in names] == [str(place) for place in range(len(costs))]
    assert len(spread) == stages
    assert all(spread)


def test_units_are_spread_by_their_parameters() -> None:
    assert units_by_stage({"a": 3, "b": 1, "c": 1, "d": 1}, 2) == [["a"], ["b", "c", "d"]]


def test_more_stages_than_units_are_refused() -> None:
    with pytest.raises(UserError, match="only 2 units"):
        units_by_stage({"a": 1, "b": 1}, 3)


def test_growing_clusters_try_the_recipes_own_stages_first() -> None:
    layouts = list(layouts_of_growing_clusters(Topology(stages=4, replicas=2), gpus_per_node=8, units=10, most=4))
    assert [layout.nodes for layout in layouts] == sorted(layout.nodes for layout in layouts)
    first = [next(layout for layout in layouts if layout.nodes == nodes) for nodes in (1, 2, 4)]
    assert [(layout.stages, layout.replicas) for layout in first] == [(4, 2), (4, 4), (4, 8)]
    assert all(layout.stages * layout.replicas == layout.world and layout.stages <= 10 for layout in layouts)
