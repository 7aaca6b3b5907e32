"""How what is trained is cut into pipeline stages: neighbours of about equal cost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from ppcl_ds.errors import UserError


def stage_bounds(
    joined: Sequence[bool], costs: Sequence[float], stages: int, what: str = "the variant's {} blocks"
) -> list[int]:
    """First layer of each stage, and after them the number of layers.

    Args:
        joined: for each layer, whether it has to stay with the one before.
        costs: of each layer, in any unit.
        what: the layers in words, with a place for their number.

    Raises:
        UserError: there are more stages than can be cut.
    """
    starts = [place for place, stays in enumerate(joined) if not stays]
    if stages > len(starts):
        text = "; blocks with linear text stay with the one whose text they read" if any(joined) else ""
        raise UserError(
            f"topology.stages is {stages}, but {what.format(len(joined))} can be cut into {len(starts)} stages at "
            f"most{text}"
        )
    edges = [*starts, len(joined)]
    groups = tuple(int(sum(costs[a:b])) for a, b in pairwise(edges))
    return [edges[bound] for bound in balanced_bounds(groups, stages)]


@lru_cache
def balanced_bounds(costs: tuple[int, ...], stages: int) -> list[int]:
    """First item of each stage, and after them the number of items, as DeepSpeed cuts a `PipelineModule`."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # DeepSpeed warns that this machine has no accelerator; nobody needs one here
    try:
        from deepspeed.runtime.utils import partition_balanced
    finally:
        logging.disable(before)
    return [int(bound) for bound in partition_balanced(list(costs), stages)]
