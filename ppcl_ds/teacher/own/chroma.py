"""Chroma: blocks are modulated by rows of a table, found by the numbers of the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ppcl_ds.teacher.own import Own

CLASSES = ("ChromaTransformer2DModel",)


def _pruned(config: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The table: three rows a single block, six a double block's image, six a double block's text, the last two."""
    double, single = config["num_layers"], config["num_single_layers"]
    image = (3 * single, 6, "transformer_blocks")
    text = (3 * single + 6 * double, 6, "transformer_blocks")
    table = ((0, 3, "single_transformer_blocks"), image, text)
    rows = [start + each * place + row for start, each, name in table for place in kept[name] for row in range(each)]
    rows += [3 * single + 12 * double, 3 * single + 12 * double + 1]
    known = config.get("modulation") or range(rows[-1] + 1)  # of a teacher that has lost blocks before
    return {"modulation": [known[row] for row in rows]}


OWN = Own(pruned=_pruned, small={"num_attention_heads": 1, "approximator_hidden_dim": 16})
