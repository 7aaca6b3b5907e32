"""Residuals of a ControlNet on a variant do what they do in the teacher with the span's blocks bypassed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import ppcl_ds
from ppcl_ds.export.consolidate import Form, consolidate
from ppcl_ds.export.controlnet import spread_residuals
from tests.calls import answer, random_arguments
from tests.conftest import TEACHERS
from tests.export.trained import pretend_trained

LISTS = {
    "qwen": {"transformer_blocks": ("num_layers", (1, 3), "controlnet_block_samples")},
    "flux": {
        "transformer_blocks": ("num_layers", (1, 2), "controlnet_block_samples"),
        "single_transformer_blocks": ("num_single_layers", (0, 2), "controlnet_single_block_samples"),
    },
    "sd3": {"transformer_blocks": ("num_layers", (2, 4), "block_controlnet_hidden_states")},
}
"""Family -> list -> key of its length, the span that becomes one block, the argument that holds its residuals."""


def silence(block: nn.Module) -> None:
    """Let a block hand on its streams as they are: all its gates are zero."""
    for name, parameter in block.named_parameters():
        if re.match(r"(img_mod|txt_mod|norm1|norm1_context|norm)\.(1|linear)", name):
            nn.init.zeros_(parameter)


def teacher_and_variant(family: str) -> tuple[Any, Any, list[list[tuple[int, int]]]]:
    """A teacher with silent spans, the model in which one silent block stands for each, and what blocks stand for."""
    class_name, config = TEACHERS[family]
    torch.manual_seed(0)
    teacher = getattr(diffusers, class_name)(**config).eval()
    changes: dict[str, Any] = {}
    spans: list[list[tuple[int, int]]] = []
    kept: dict[str, list[int]] = {}
    for name, (key, (first, last), _) in LISTS[family].items():
        for block in getattr(teacher, name)[first : last + 1]:
            silence(block)
        kept[name] = [place for place in range(config[key]) if not first < place <= last]
        changes[key] = len(kept[name])
        spans.append([(place, last if place == first else place) for place in kept[name]])
    if family == "sd3":
        changes["dual_attention_layers"] = [0, 1]
    variant = getattr(diffusers, class_name)(**config | changes).eval()
    state = {name: each for name, each in teacher.state_dict().items() if not name.startswith(tuple(kept))}
    for name, places in kept.items():
        for new, old in enumerate(places):
            state |= {f"{name}.{new}.{key}": each for key, each in getattr(teacher, name)[old].state_dict().items()}
    variant.load_state_dict(state)
    return teacher, variant, spans


def residuals(family: str, count: int, width: int) -> dict[str, list[Tensor]]:
    """As a ControlNet of `count` blocks hands them on."""
    generator = torch.Generator().manual_seed(5)
    return {
        key: [torch.randn(2, 16, width, generator=generator) for _ in range(count)]
        for _, _, key in LISTS[family].values()
    }


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("family", LISTS)
def test_residuals_reach_the_blocks_that_they_were_made_for(family: str, count: int) -> None:
    teacher, variant, spans = teacher_and_variant(family)
    arguments = random_arguments(TEACHERS[family][0])
    torch.testing.assert_close(answer(variant, arguments), answer(teacher, arguments))
    arguments |= residuals(family, count, 32)
    expected = answer(teacher, arguments)
    misplaced = answer(variant, arguments)
    assert (misplaced - expected).norm() > 1e-3 * expected.norm()
    handle = spread_residuals(variant, spans)
    torch.testing.assert_close(answer(variant, arguments), expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    torch.testing.assert_close(answer(variant, arguments), misplaced)


def test_a_loaded_variant_spreads_them_by_itself(new_run: Callable[..., Path]) -> None:
    recipe = pretend_trained(new_run("qwen"), "qwen")
    consolidate(recipe, ["small"], Form())
    folder = recipe.pruned("small").parent
    plain = diffusers.QwenImageTransformer2DModel.from_pretrained(folder / "transformer").eval()
    pipeline: Any = ppcl_ds.load_pipeline(folder, torch.float32)
    arguments = random_arguments("QwenImageTransformer2DModel")
    torch.testing.assert_close(answer(pipeline.transformer, arguments), answer(plain, arguments))
    six = residuals("qwen", 6, 32)["controlnet_block_samples"]
    # `small` plugs spans [0, 2] and [3, 4] of six blocks
    by_hand = arguments | {"controlnet_block_samples": [six[0] + six[1] + six[2], six[3] + six[4], six[5]]}
    found = answer(pipeline.transformer, arguments | {"controlnet_block_samples": six})
    torch.testing.assert_close(found, answer(plain, by_hand))
