"""Keys of stock configurations that follow the blocks: found by building empty models, expected by reading upstream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ppcl_ds.teacher.keys import Keys
from ppcl_ds.teacher.teacher import Teacher
from tests.families.teachers import TEACHERS


def keys_of(name: str, folder: Path, **changes: Any) -> Keys:
    """Of a tiny teacher with some of its configuration changed; its configuration is enough."""
    teacher = TEACHERS.get(name)
    if teacher is None:
        pytest.skip(f"this diffusers has no {name}")
    config = {"_class_name": teacher.class_name, **teacher.config, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return Teacher(folder, weights=False).keys


def test_the_two_lengths_of_flux(tmp_path: Path) -> None:
    assert keys_of("flux", tmp_path, num_layers=3, num_single_layers=5) == Keys(
        lengths={
            "num_layers": frozenset({"transformer_blocks"}),
            "num_single_layers": frozenset({"single_transformer_blocks"}),
        },
        positions={},
        first={},
        last={},
    )


def test_two_lengths_that_are_the_same_number_are_told_apart(tmp_path: Path) -> None:
    lengths = keys_of("flux", tmp_path, num_layers=4, num_single_layers=4).lengths
    assert lengths == {
        "num_layers": {"transformer_blocks"},
        "num_single_layers": {"single_transformer_blocks"},
    }


@pytest.mark.parametrize("layers", [[0, 1, 2], [0], [1, 4]])
def test_positions_of_dual_attention(tmp_path: Path, layers: list[int]) -> None:
    keys = keys_of("sd35_medium", tmp_path, dual_attention_layers=layers)
    assert keys.positions == {"dual_attention_layers": "transformer_blocks"}
    assert keys.lengths == {"num_layers": {"transformer_blocks"}}
    assert not keys.first
    assert not keys.last


def test_no_positions_where_none_are_listed(tmp_path: Path) -> None:
    assert keys_of("sd35_medium", tmp_path, dual_attention_layers=[]).positions == {}


def test_numbers_of_axes_are_no_positions(tmp_path: Path) -> None:
    assert keys_of("flux", tmp_path, num_single_layers=9).positions == {}, "axes_dims_rope is (4, 6, 6)"


@pytest.mark.parametrize(("blocks", "joint"), [(5, 2), (5, 4), (4, 1)])
def test_the_first_blocks_of_easyanimate_have_a_shape_of_their_own(tmp_path: Path, blocks: int, joint: int) -> None:
    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2)
    config |= dict(sample_width=8, sample_height=8, time_embed_dim=8, text_embed_dim=16)
    named = {"_class_name": "EasyAnimateTransformer3DModel", **config, "num_layers": blocks, "mmdit_layers": joint}
    (tmp_path / "config.json").write_text(json.dumps(named))
    keys = Teacher(tmp_path, weights=False).keys
    assert keys.first == {"mmdit_layers": "transformer_blocks"}
    assert keys.lengths == {"num_layers": {"transformer_blocks"}}
    assert not keys.last


@pytest.mark.parametrize("refiners", [1, 3, 5])
def test_one_length_of_two_lists_of_refiners(tmp_path: Path, refiners: int) -> None:
    keys = keys_of("z_image", tmp_path, n_layers=5, n_refiner_layers=refiners)
    assert keys.lengths == {
        "n_layers": {"layers"},
        "n_refiner_layers": {"noise_refiner", "context_refiner"},
    }


def test_a_length_is_found_though_a_key_has_an_entry_a_block(tmp_path: Path) -> None:
    turns = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    keys = keys_of("ace_step", tmp_path, num_hidden_layers=4, layer_types=turns)
    assert keys.lengths["num_hidden_layers"] == {"layers"}


def test_the_lists_beside_that_are_as_long(tmp_path: Path) -> None:
    keys = keys_of("wan_vace", tmp_path)
    assert keys.lengths == {"num_layers": {"blocks"}}, "the control blocks are as many as vace_layers"
    assert keys.positions.get("vace_layers") in (None, "vace_blocks")
