"""Models that do not fit on a GPU are used all the same, a part at a time; what is too small says what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ppcl_ds.export.placing import place_pipeline, placed, size_of
from tests.calls import answer, random_arguments
from tests.conftest import TEACHERS

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("family", ["qwen", "flux", "sd3"])
def test_a_model_computes_the_same_a_layer_at_a_time(family: str) -> None:
    """Its weights are nowhere while it does nothing, and back afterwards."""
    import diffusers

    name, config = TEACHERS[family]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval()
    arguments = random_arguments(name, 1, lengths=(5, 3), dtype=torch.float32)
    with torch.no_grad(), placed(model, CPU, fits=True):
        expected = answer(model, arguments)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad(), placed(model, CPU, fits=False):
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(answer(model, arguments), expected)
        assert all(parameter.is_meta for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(answer(model, arguments), expected)


@pytest.mark.parametrize(
    ("memory", "asked"),
    [(400, "to"), (160, "enable_model_cpu_offload"), (100, "enable_sequential_cpu_offload")],
    ids=["all of it", "each model by itself", "a layer"],
)
def test_a_pipeline_keeps_in_cpu_memory_what_does_not_fit(
    memory: int, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 120 and 32 bytes of weights; a part of the memory is for activations. What is asked is diffusers' own."""
    called = []
    parts = {"transformer": nn.Linear(5, 5), "vae": nn.Linear(3, 2, bias=True), "scheduler": object()}
    assert [size_of(part) for part in parts.values() if isinstance(part, nn.Module)] == [120, 32]
    about = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    names = ("to", "enable_model_cpu_offload", "enable_sequential_cpu_offload")
    assert all(hasattr(DiffusionPipeline, name) for name in names)
    pipeline: Any = SimpleNamespace(components=parts)
    for name in names:
        setattr(pipeline, name, lambda *_, name=name, **__: called.append(name))
    assert bool(place_pipeline(pipeline, GPU)) == (asked != "to")
    assert called == [asked]
    assert place_pipeline(pipeline, CPU) == ""
