"""Captions of every tiny pipeline, encoded each by itself and together: how they are joined is learned, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.text import Joining, Tree, from_stored, mapped, to_stored
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.batch_call import Asked, BatchCall
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.pipeline_run import SOURCES
from tests.families.core import cases
from tests.families.pipelines import PIPELINES, TinyPipeline
from tests.families.test_call import REFUSED as ASKED_REFUSED
from tests.families.test_call import assert_equal, made, opened

RUNG = 100
SHORT, LONG = "a cat", "a dog that runs over a green field in the rain"

TOGETHER = {
    "ace_step": "cannot be asked",  # lyrics are one for all
    "dit": "has no method encode_prompt",
    "sana_sprint": "cannot be asked",  # draws two steps or none
}
"""Pipelines that cannot encode, or not two captions together -> what the refusal says."""

REFUSED = {
    "kandinsky5_t2i": "become one of",  # places where captions end are counted through
    "kandinsky5_t2v": "become one of",
}
"""Pipelines whose captions are put together in a way of their own -> what the refusal says."""

UNPADDED = {"longcat_audio", "cogview4", "bria_fibo", "bria_fibo2", "lumina_next", "latte"}
"""Pipelines that encode the padding of a shorter caption, so it is not zeros."""


UNJOINED = {"ernie_image"}
"""Pipelines that pad captions themselves, as long as what they are given together."""


def shape_of(path: Any, leaf: Any) -> Any:
    return str(leaf.shape) if isinstance(leaf, Tensor) else leaf


def encoder_of(family: TinyPipeline, pipe: Any, folder: Path) -> tuple[PipelineCall, Size]:
    call, size = opened(family, pipe, folder)
    return PipelineCall(folder, call.component, call.options, encodes="all"), size


def encoded(encoder: PipelineCall, size: Size) -> tuple[Tree, Tree, Tree]:
    """What the pipeline makes of the short caption, of the long one, and of both together."""
    short, long, both = (encoder.encode(captions, size).text for captions in (SHORT, LONG, [SHORT, LONG]))
    return short, long, both


@pytest.mark.parametrize(
    "name", cases(n for n, each in PIPELINES.items() if not (each.needs or set(SOURCES) & set(each.call)))
)
def test_how_captions_are_joined_is_learned_or_refused(name: str, tmp_path: Path) -> None:
    family, pipe = made(name)
    if name in TOGETHER:
        with pytest.raises(UserError, match=TOGETHER[name]):
            encoded(*encoder_of(family, pipe, tmp_path))
        return
    encoder, size = encoder_of(family, pipe, tmp_path)
    short, long, both = encoded(encoder, size)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            Joining.learn(short, long, both)
        return
    joining = Joining.learn(short, long, both)
    print(f"{'PADDED' if joining.padded else 'UNPADDED'} {name}")
    assert joining.padded == (name not in UNPADDED)
    assert joining.batch or joining.lists
    assert_equal(joining([long]), long)
    for text in (short, long):
        read = from_stored(*to_stored(text, "text"))
        assert_equal(mapped(read, shape_of), mapped(text, shape_of))
        assert_equal(from_stored(*to_stored(read, "text")), read)
    call = PipelineCall(tmp_path, encoder.component, encoder.options)
    if name in UNJOINED:
        with pytest.raises(UserError, match="of unlike length"):
            asks_for_two(call, joining, size, short, long, both)
    elif name not in ASKED_REFUSED and joining.padded:
        asks_for_two(call, joining, size, short, long, both)


def asks_for_two(call: PipelineCall, joining: Joining, size: Size, short: Tree, long: Tree, both: Tree) -> None:
    """Two samples asked for one by one and joined are what the stock pipeline makes of both together."""
    latents = torch.randn(2, *call.latents_shape(size)[1:], generator=torch.Generator().manual_seed(0))
    expected = call.arguments(latents, RUNG, Prompt(both), size)
    samples = [Asked(latents[:1], RUNG, Prompt(short)), Asked(latents[1:], RUNG, Prompt(long))]
    found = BatchCall(call, joining).arguments(samples, size)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value)


def assert_close(own: Any, others: Any) -> None:
    """Equal but for the rounding of encoders that read a batch."""
    mine, tree = pytree.tree_flatten(own)
    theirs, other = pytree.tree_flatten(others)
    assert str(tree) == str(other)
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(b, Tensor):
            assert a.shape == b.shape
            assert torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4)
        else:
            assert a == b or a is b
