"""A variant as one safetensors file that ComfyUI or stable-diffusion.cpp loads; names by `names.yaml`.

Both tell a model's family, and its number of blocks, from the names and shapes in the file. Where a tool takes a
number from elsewhere (ComfyUI takes SD3's blocks from its width), a model that has another one is refused for that
tool: it would not load, or compute something else. The file's metadata has no `config`, which ComfyUI would believe
before the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ppcl_ds.errors import UserError
from ppcl_ds.export.names import load_names, to_file
from ppcl_ds.teacher.files import Source, Sources
from ppcl_ds.units.variant import Layout

TOOLS = {
    "comfyui": "ComfyUI",
    "comfyui-fp8": "ComfyUI, in fp8,",
    "comfyui-int8": "ComfyUI, in int8,",
    "sd.cpp": "stable-diffusion.cpp",
}
"""As the command calls it, with how its matrices are quantised -> as people do."""

_SMALL = 1024
_IN_A_BLOCK = re.compile(r"(?:^|\.)\w*(?:blocks|layers|refiner)\.\d+\.")


def is_block_matrix(name: str, source: Source) -> bool:
    """Whether a tensor of a single file is worth quantising: what is small, or outside the blocks, is not."""
    return len(source.shape) == 2 and source.shape.numel() > _SMALL and _IN_A_BLOCK.search(name) is not None


def single_file_tensors(layout: Layout, tool: str = "comfyui") -> Sources:
    """The layout's tensors under the names that a tool expects.

    Args:
        tool: a key of `TOOLS`.

    Raises:
        UserError: this family cannot be written so; the message says why.
    """
    family = str(layout.config["_class_name"])
    if family.startswith("Pruned"):
        raise UserError(f"--single-file: {TOOLS[tool]} builds whole blocks, and a {family} lacks parts of some")
    names = load_names().get(family)
    if names is None:
        raise UserError(f"--single-file: how {TOOLS[tool]} names the tensors of {family} is not known here")
    if tool in names.lack:
        raise UserError(f"--single-file: {TOOLS[tool]} has no {family}")
    _check_taken(family, names.taken.get(tool.partition("-")[0], {}), layout.config, tool)
    if not names.names:
        raise UserError(f"--single-file: how {TOOLS[tool]} names the tensors of {family} is not known here")
    try:
        return to_file(names, layout.config, layout.tensors)
    except UserError as fault:
        raise UserError(f"--single-file: {family}: {fault}") from None


def _check_taken(family: str, taken: Mapping[str, Any], config: Mapping[str, Any], tool: str) -> None:
    """Refuse a model in which what the tool takes for granted is not so."""
    for key, value in taken.items():
        if isinstance(value, Mapping):
            [(condition, value)] = value.items()
            if config.get(condition) is False:  # not there: the class's default, which is true
                continue
        if config.get(key) not in ([config.get(value)] if isinstance(value, str) else value):
            words = value if isinstance(value, str) else " or ".join(map(str, value))
            raise UserError(
                f"--single-file: {TOOLS[tool]} does not count {key} of {family}, it takes it for {words}; this one "
                f"has {config.get(key)}, so it cannot load there; use the folder in diffusers, or a tool that counts"
            )
