"""How much of the teacher ZeRO-3 gathers at a time: the next block while one is at work, and no more."""

from __future__ import annotations

from typing import Any

from ppcl_ds.teacher.teacher import Teacher

_BUCKET, _LIVE = "stage3_prefetch_bucket_size", "stage3_max_live_parameters"
_WHOLE = "stage3_param_persistence_threshold"


def with_gathering(config: dict[str, Any], teacher: Teacher) -> dict[str, Any]:
    """A DeepSpeed configuration whose gathers are sized to the teacher, where it does not size them itself.

    DeepSpeed fetches ahead, parameter by parameter, until its bucket is full, and begins with what is needed next. So a
    bucket of the largest block has the next block under way before it begins; a smaller one leaves the rest of it to be
    waited for, and a larger one is ahead by more with every block. Where blocks are of different sizes, what is fetched
    of a third one is limited.

    Args:
        config: with ZeRO stage 3.
    """
    zero = config.get("zero_optimization", {})
    whole = zero.get(_WHOLE, 100_000)  # small parameters are never fetched: every rank has them
    sizes = [[p.numel() for p in teacher.module(block).parameters() if p.numel() > whole] for block in teacher.blocks]
    bucket, parameter = max(map(sum, sizes)), max(parameter.numel() for parameter in teacher.empty.parameters())
    zero = {_BUCKET: bucket, _LIVE: 2 * (bucket + parameter)} | zero
    return config | {"zero_optimization": zero}
