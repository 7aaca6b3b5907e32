"""Quantised exports load with stock diffusers, and say what quantising costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ppcl_ds.data.index import Index
from ppcl_ds.data.shards import Shards
from ppcl_ds.errors import UserError
from ppcl_ds.export import quantise
from ppcl_ds.export.consolidate import Form, consolidate
from ppcl_ds.export.load import load_pipeline
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.heldout import HeldOut, mean_squared
from ppcl_ds.teacher.teacher import open_teacher
from tests.export.trained import pretend_trained


def four_steps(recipe: Recipe, model: Any) -> torch.Tensor:
    """Latents of the held-out captions, one by one, as the stock pipeline itself draws them."""
    pipeline: Any = load_pipeline(recipe.teacher.path, torch.float32)
    pipeline.transformer = model
    pipeline.set_progress_bar_config(disable=True)
    raw = recipe.data.shards / "raw"
    listed = Index.read(raw / "index.json", "ppcl-data shard").shards
    shards = Shards([entry for entry in listed if entry.name.startswith("heldout-")], raw)
    found = []
    for number in range(min(8, len(shards))):
        caption = shards.read(number)[1]["txt"].decode()
        generator = torch.Generator().manual_seed(recipe.seed + number)
        options: dict[str, Any] = {"height": 8, "width": 8, "num_inference_steps": 4, "output_type": "latent"}
        options |= {"true_cfg_scale": recipe.evaluate.guidance, "negative_prompt": " "}
        found.append(pipeline(caption, generator=generator, **options).images)
    return torch.cat(found)


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_quantised_weights_load_as_they_are_and_the_card_says_what_they_cost(
    new_run: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    pytest.importorskip("torchao")
    recipe = pretend_trained(new_run("qwen"), "qwen")
    consolidate(recipe, ["small"], Form.checked(None, "5GB", None, None, method), out=tmp_path / "small")
    consolidate(recipe, ["small"], Form())
    model_class = diffusers.QwenImageTransformer2DModel
    quantised = model_class.from_pretrained(tmp_path / "small" / "transformer", torch_dtype=torch.float32)
    plain = model_class.from_pretrained(recipe.pruned("small"))
    assert (
        type(quantised.transformer_blocks[0].attn.to_q.weight.data).__name__
        == f"{method[:-1].replace('fp', 'Float').title()}8Tensor"
    )
    sizes = [
        sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (recipe.pruned("small"), tmp_path / "small/transformer")
    ]
    assert sizes[1] < 0.5 * sizes[0]

    heldout = HeldOut(recipe, open_teacher(recipe), torch.device("cpu"))
    error = mean_squared(heldout.velocities(plain.eval()), heldout.velocities(quantised.eval()))
    said = json.loads((tmp_path / "small" / "variant.json").read_text())["quantised"]
    assert said["velocity_mse"] == pytest.approx(error)
    assert 0 < error < 0.05 * said["velocity_power"]
    drawn = [four_steps(recipe, model) for model in (plain, quantised)]
    off = float((drawn[0] - drawn[1]).square().mean())
    assert said["drawn_mse"] == pytest.approx(off, rel=1e-4)
    assert said["drawn_power"] == pytest.approx(float(drawn[0].square().mean()), rel=1e-4)
    assert 0 < off < 0.05 * said["drawn_power"]
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"drawn in 4 steps from the same noise differ by {off:.3g}," in card
    assert f"is {error:.3g}," in card
    assert f"- {method}" in card
    assert not (tmp_path / "small" / "plain").exists()


def test_what_this_machine_cannot_quantise_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchao" else name)
    for method, message in (("int8", "pip install torchao"), ("nf4", "nf4 needs a GPU")):
        with pytest.raises(UserError, match=message):
            quantise.check_backend(method)


@pytest.mark.parametrize(
    ("dtype", "size", "single_file", "method", "message"),
    [
        ("fp8", "5GB", None, None, "--dtype: 'fp8' is not one of fp32, bf16, fp16"),
        (None, "5GiB", None, None, "--max-shard-size: '5GiB' is no size"),
        (None, "-5GB", None, None, "--max-shard-size: '-5GB' is no size"),
        (None, "5GB", None, "int4", "--quantize: 'int4' is not one of int8, fp8, nf4"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(
    dtype: str | None, size: str, single_file: str | None, method: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Form.checked(dtype, size, single_file, None, method)
