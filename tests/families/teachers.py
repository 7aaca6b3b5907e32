"""Every tiny teacher that the installed diffusers can build, by the name of its family: of all `*_teachers.py`."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from tests.families.tiny import TinyTeacher

_FILES = [
    import_module(f"tests.families.{module.name}")
    for module in pkgutil.iter_modules([str(Path(__file__).parent)])
    if module.name.endswith("_teachers")
]
TEACHERS: dict[str, TinyTeacher] = {
    name: teacher
    for file in _FILES
    for name, teacher in file.TEACHERS.items()
    if hasattr(diffusers, teacher.class_name)  # a diffusers that is older than a family lacks its class
}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The frozen random teacher of a family in evaluation mode, and the arguments of one call of it."""
    teacher = TEACHERS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, teacher.class_name)(**teacher.config).eval().requires_grad_(False)
    shake(model)
    return model, dict(teacher.inputs)


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Random numbers in place of zeros and ones at the start, which hide what a block does.

    Some parameters are left as memory was: those too.
    """
    for parameter in model.parameters():
        if parameter.dim() > 2 or not torch.isfinite(parameter).all():
            parameter.copy_(0.1 * torch.randn_like(parameter))
        elif parameter.dim() < 2 or not parameter.any():
            parameter.add_(0.05 * torch.randn_like(parameter))
