"""Weights & Biases: a stand-in of its package records what it is asked for, which must be what TensorBoard shows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.watch.mirror import Mirror, check_package
from ppcl_ds.watch.tensorboard import TensorBoard, read_scalars
from tests.test_recipe import TEXT


class StandIn:
    """The `wandb` package as far as a training uses it."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str]] = []
        self.finished = 0

    def init(self, **settings: Any) -> Any:
        self.begun.append(settings)
        return SimpleNamespace(
            log=self.logged.append,
            finish=self.finish,
            define_metric=lambda name, step_metric: self.axes.append((name, step_metric)),
        )

    def finish(self) -> None:
        self.finished += 1

    @staticmethod
    def Image(pixels: np.ndarray) -> np.ndarray:  # noqa: N802 - as it is called there
        return pixels


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    made = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT.replace("run: runs/a", f"run: {tmp_path / 'my run'}") + "wandb: {project: pruning}\n")
    return load_recipe(path)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_it_is_given_what_tensorboard_is(wandb: StandIn, recipe: Recipe) -> None:
    folder = recipe.distillation
    board = TensorBoard(folder.board, 1, lambda: Mirror(recipe, folder))
    for step in (1, 2):
        board.scalars(step, {"run/loss": 0.5 / step, "unit/loss/image": 0.25 * step})
    board.scalars(3, {})
    board.images(2, {"teacher": torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)})
    board.close()
    *points, pictures = wandb.logged
    for name, found in read_scalars(folder.board).items():
        assert [(point["step"], point[name]) for point in points] == found
    strip = pictures.pop("samples/teacher")
    assert (pictures, strip.shape, strip.dtype) == ({"step": 2}, (4, 10, 3), np.uint8)
    assert strip[0, 0].tolist() == [0, 128, 255]
    assert (wandb.axes, wandb.finished) == ([("*", "step")], 1)


def test_a_later_start_goes_on_with_the_same_run(wandb: StandIn, recipe: Recipe) -> None:
    Mirror(recipe, recipe.distillation)
    Mirror(recipe, recipe.distillation)
    Mirror(recipe, recipe.finetuning("small"))
    first, again, tuning = wandb.begun
    assert first == again
    assert (first["project"], first["name"], first["entity"], first["mode"]) == (
        "pruning",
        "my run distill",
        None,
        "online",
    )
    assert first["resume"] == "allow"
    assert first["config"]["distill"]["steps"] == 4
    assert tuning["name"] == "my run finetune small"
    assert tuning["id"] != first["id"]


def test_a_login_that_is_missing_is_one_line(wandb: StandIn, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"wandb: api_key not configured \(no-tty\); `wandb login`, or wandb.mode: off"):
        Mirror(recipe, recipe.distillation)


def test_without_its_package_the_key_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppcl_ds.watch.mirror.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"key 'wandb': its package is not here; pip install 'ppcl-ds\[wandb\]'"):
        check_package(recipe)
    check_package(recipe.model_copy(update={"wandb": None}))
