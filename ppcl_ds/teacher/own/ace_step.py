"""ACE-Step: which blocks attend in a window is listed block by block, and where nothing is listed, by turns."""

from __future__ import annotations

from typing import Any

from ppcl_ds.teacher.own import Own

CLASSES = ("AceStepTransformer1DModel",)


def _filled(config: dict[str, Any]) -> dict[str, Any]:
    blocks = config["num_hidden_layers"]
    by_turns = ["sliding_attention" if block % 2 == 0 else "full_attention" for block in range(blocks)]
    return {"layer_types": config.get("layer_types") or by_turns}


OWN = Own(entries={"layer_types": ("layers",)}, filled=_filled, real=("condition_encoder",))
