"""`distill.compile` changes nothing but rounding, compiles what is alike once, and goes on where nothing compiles.

The ordinary suite compiles down to the operations of autograd (`aot_eager`); the whole way to kernels takes minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppcl_ds.recipe import load_recipe
from ppcl_ds.watch.tensorboard import read_scalars
from tests.conftest import command
from tests.plans import ten_spans
from tests.ranks import run

NewRun = Callable[..., Path]
STEPS = 2


def losses(path: Path) -> dict[str, list[float]]:
    scalars = read_scalars(load_recipe(path).distillation.board)
    return {name: [value for _, value in points] for name, points in scalars.items() if "/loss/" in name}


def planned(new_run: NewRun, compile: bool) -> Path:
    path = new_run(
        "qwen", distill={"steps": STEPS, "log_every": 1, "compile": compile, "activation_checkpointing": True}
    )
    ten_spans().save(load_recipe(path).plan_file)
    return path


@pytest.fixture
def plain(new_run: NewRun) -> dict[str, list[float]]:
    path = planned(new_run, compile=False)
    command("distill", path)
    return losses(path)


def compiled(new_run: NewRun, folder: Path, backend: str) -> tuple[dict[str, list[float]], str, list[dict[str, Any]]]:
    path = planned(new_run, compile=True)
    done = run(
        "tests.training.compiling", "distill", path, env={"BACKEND": backend, "COUNTED": str(folder)}, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(path), done.stderr, [json.loads((folder / rank).read_text()) for rank in "01"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_units_learn_what_units_learn(
    new_run: NewRun, plain: dict[str, list[float]], tmp_path: Path, backend: str
) -> None:
    found, said, counted = compiled(new_run, tmp_path, backend)
    assert found.keys() == plain.keys()
    for name, values in plain.items():
        assert found[name] == pytest.approx(values, rel=1e-4)
    assert "does not compile" not in said
    for rank in counted:
        assert rank["graphs"] < 2 * 5, "a stage has five units, and not a block and a loss of its own for each"
        assert backend != "inductor" or 0 < rank["kernels"] < rank["nodes"]


def test_what_does_not_compile_runs_as_it_is_and_is_named_once(
    new_run: NewRun, plain: dict[str, list[float]], tmp_path: Path
) -> None:
    found, said, _ = compiled(new_run, tmp_path, "none")
    assert found == plain
    lines = {line for line in said.splitlines() if line.startswith("note: ")}  # the launcher prints alike ones once
    assert len(lines) == 2
    assert all("does not compile, and runs as it is" in line for line in lines)
    assert any("QwenImageTransformerBlock" in line for line in lines)
    assert all("an operation that nobody has heard of" in line for line in lines)
