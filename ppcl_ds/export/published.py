"""`ppcl import`: the width-pruned Qwen-Image checkpoints that PPCL's authors published, as models of our classes.

Their transformers are `QwenImageTransformer2DModel` in name, but need a modelling file of their own, which is not in
the checkpoint. Three keys of their configuration say what is gone, in the numbers of the blocks that are left (read off
github.com/OPPO-Mente-Lab/Qwen-Image-Pruning, src/transformer_qwenimage_pruning.py):

    single_stream_index   blocks without a text stream: attention reads `txt_proj` of the modulated text of the last
                          block before them that has one
    ehs_proj_index        of those, blocks after which the text stream moves on by `ehs_proj`
    ffn_proj_index        blocks whose feed-forwards are one linear each (`img_ffn_proj`, `txt_ffn_proj`), added to the
                          stream without modulation; half of their modulation is gone with it

`modeling_pruned.py` computes the same, operation by operation, under other names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ppcl_ds.errors import UserError
from ppcl_ds.export.model_folder import MODELING
from ppcl_ds.export.pipeline_folder import require_new, write_pipeline
from ppcl_ds.teacher.files import ModelFiles
from ppcl_ds.units.variant import laid_out

_KEYS = ("single_stream_index", "ffn_proj_index", "ehs_proj_index")
_NAMES = {"txt_proj": "text_in", "ehs_proj": "text_out", "img_ffn_proj": "img_mlp", "txt_ffn_proj": "txt_mlp"}
_GONE = "attn.to_add_out."
"""Of blocks without a text stream: stored, but what it computes is thrown away."""


def import_published(source: Path, out: Path, max_shard_size: int) -> None:
    """Write a published checkpoint as a folder that loads with our modelling file.

    Args:
        source: a pipeline folder, or its transformer's; the rest of a pipeline comes along.
        max_shard_size: bytes of a weights file.

    Raises:
        UserError: one line that says what is wrong.
    """
    files = ModelFiles(source)
    missing = [key for key in _KEYS if key not in files.config]
    if missing or files.class_name != "QwenImageTransformer2DModel":
        raise UserError(
            f"{source}: not a published width-pruned Qwen-Image; config.json "
            + (f"has no {missing[0]}" if missing else f"names class {files.class_name}")
        )
    require_new(out)
    config = pruned_config(files.config)
    tensors = {_renamed(key): files.source(key) for key in sorted(files.keys) if not _is_gone(key, files.config)}
    write_pipeline(laid_out(f"{source}", config, tensors), source, MODELING, out, max_shard_size)


def pruned_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the same model in `modeling_pruned.py`."""
    single, linear, jumps = (sorted(config[key]) for key in _KEYS)
    block = "transformer_blocks.{}".format
    ffns = [f"{block(index)}.img_mlp" for index in linear]
    ffns += [f"{block(index)}.txt_mlp" for index in linear if index not in single]
    own = {
        "_class_name": "PrunedQwenImageTransformer2DModel",
        "linear_text": [block(index) for index in single],
        "text_jumps": [block(index) for index in jumps],
        "narrow_ffn": dict.fromkeys(ffns, 0),
        "plain_ffn": ffns,
    }
    return {key: value for key, value in config.items() if key not in _KEYS} | own


def _renamed(key: str) -> str:
    """`transformer_blocks.7.txt_proj.weight` -> `transformer_blocks.7.text_in.weight`, and so on."""
    pattern = rf"(transformer_blocks\.\d+)\.({'|'.join(_NAMES)})\."
    return re.sub(pattern, lambda found: f"{found[1]}.{_NAMES[found[2]]}.", key)


def _is_gone(key: str, config: dict[str, Any]) -> bool:
    return any(key.startswith(f"transformer_blocks.{index}.{_GONE}") for index in config["single_stream_index"])
