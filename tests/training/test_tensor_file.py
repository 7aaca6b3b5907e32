"""Checkpoints are safetensors files like any other, and whoever watches sees them grow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl_ds.training import tensor_file
from ppcl_ds.training.tensor_file import copied, write_tensors


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = {
        "unit/master": torch.randn(1000, dtype=torch.float32),
        "unit/step": torch.tensor(7.0),
        "empty": torch.zeros(0),
        "bf16": torch.randn(3, 5).bfloat16().t(),
        "random": torch.get_rng_state(),
    }
    copies = {name: copied(tensor) for name, tensor in tensors.items()}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()  # training goes on
    write_tensors(copies, tmp_path / "ours", lambda: None)
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_there_is_a_sign_of_life_for_every_piece_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_PIECE", 4096)
    path, sizes = tmp_path / "file", []
    tensors = {"a": copied(torch.zeros(5000)), "b": copied(torch.zeros(1))}
    write_tensors(tensors, path, lambda: sizes.append(path.stat().st_size))
    assert sizes == sorted(set(sizes))
    assert len(sizes) == 1 + 5 + 1
    assert sizes[-1] == path.stat().st_size
