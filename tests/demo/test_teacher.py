"""The demo's teacher begins with nothing, is trained on pictures of the raw shards, and learns what captions say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ppcl_ds.demo import teacher
from ppcl_ds.demo.teacher import fit, fresh_pipeline, read_images, train_teacher
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import load_recipe
from ppcl_ds.sections import DemoTeacher, Noise
from tests.calls import answer, random_arguments
from tests.conftest import TEACHERS

QWEN, CONFIG = TEACHERS["qwen"]


def demo(**changes: Any) -> DemoTeacher:
    return DemoTeacher.model_validate({"config": CONFIG | {"num_layers": 2}, "steps": 20} | changes)


def test_a_fresh_one_says_nothing_and_its_blocks_change_nothing() -> None:
    state = torch.random.get_rng_state()
    model = fresh_pipeline(demo(), seed=3).transformer
    assert torch.equal(torch.random.get_rng_state(), state)
    arguments = random_arguments(QWEN)
    seen: list[Any] = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda _, args, kwargs, output: seen.append((kwargs, output)), with_kwargs=True)
    assert not answer(model, arguments).any()
    for given, (text, image) in seen:
        assert torch.equal(text, given["encoder_hidden_states"])
        assert torch.equal(image, given["hidden_states"])
    again, other = (fresh_pipeline(demo(), seed).transformer.state_dict() for seed in (3, 4))
    torch.testing.assert_close(dict(model.state_dict()), dict(again), rtol=0, atol=0)
    assert any(not torch.equal(other[key], again[key]) for key in again)


def test_a_key_that_the_transformer_does_not_have_is_named() -> None:
    with pytest.raises(UserError, match=r"demo\.config: .*num_blocks"):
        fresh_pipeline(demo(config=CONFIG | {"num_blocks": 3}), seed=0)


def test_it_is_trained_on_all_pictures_but_the_heldout_ones(prepared: Callable[[str], Path]) -> None:
    run = prepared("qwen")
    images, captions = read_images(run / "shards" / "raw")
    assert images.shape == (48, 3, 8, 8)  # a quarter of 64 is held out
    stored = {}
    for path in (run / "images").glob("*.png"):
        pixels = np.asarray(Image.open(path)).astype(np.float32) / 127.5 - 1
        stored[pixels.tobytes()] = path.with_suffix(".txt").read_text()
    for image, caption in zip(images, captions, strict=True):
        assert torch.equal(image[0], image[1])
        assert stored[image[2].numpy().tobytes()] == caption


def test_it_learns_to_draw_what_captions_say() -> None:
    settings = demo(steps=150, batch_size=16, lr=3e-3, ema=0.9)
    pipeline = fresh_pipeline(settings, seed=0)
    images = torch.full((32, 3, 8, 8), 0.8)
    images[::2] *= -1
    captions = ["a dark one", "a light one"] * 16
    fit(pipeline, images, captions, Noise(), settings, torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    drawn = pipeline(["a dark one", "a light one"] * 4, num_inference_steps=8, generator=noise, output_type="pt").images
    assert drawn[::2].mean() < 0.3
    assert drawn[1::2].mean() > 0.7


def test_it_is_saved_whole_and_one_that_is_there_is_kept(new_run: Callable[..., Path]) -> None:
    recipe = load_recipe(new_run("qwen"))
    recipe = recipe.model_copy(update={"demo": demo(steps=2, batch_size=4)})
    before = {file: file.read_bytes() for file in recipe.teacher.path.rglob("*") if file.is_file()}
    train_teacher(recipe)
    assert {file: file.read_bytes() for file in recipe.teacher.path.rglob("*") if file.is_file()} == before
    elsewhere = recipe.teacher.model_copy(update={"path": recipe.run / "new"})
    train_teacher(recipe.model_copy(update={"teacher": elsewhere}))
    assert {file.name for file in (recipe.run / "new").iterdir()} == {
        file.name for file in recipe.teacher.path.iterdir()
    }
    with pytest.raises(UserError, match="key 'demo' is missing"):
        train_teacher(recipe.model_copy(update={"demo": None}))


def test_one_that_was_stopped_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = demo(steps=9, batch_size=8)
    images = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    captions = [f"{word} number" for word in ("one", "two", "three", "four") for _ in range(5)]
    monkeypatch.setattr(teacher, "_SAVED_EVERY", -1.0)

    def trained(state: Path | None, stop: int = 100) -> dict[str, Tensor]:
        pipeline, left = fresh_pipeline(settings, seed=0), iter(range(stop))

        def count(*_: Any) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        pipeline.transformer.register_forward_pre_hook(count)
        fit(pipeline, images, captions, Noise(), settings, torch.Generator().manual_seed(0), state)
        return dict(pipeline.transformer.state_dict())

    whole, state = trained(None), tmp_path / "state.pt"
    for stop in (4, 2):  # in an epoch, and again
        with pytest.raises(KeyboardInterrupt):
            trained(state, stop)
    torch.testing.assert_close(trained(state), whole, rtol=0, atol=0)
    settings = demo(steps=10, batch_size=8)
    with pytest.raises(UserError, match="another section 'demo'"):
        trained(state)
    state.write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot be read"):
        trained(state)
