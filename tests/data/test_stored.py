"""Encoded samples on disk: they come back, damage is named, and prompts are put together as the pipeline would."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.guiding import Guiding
from ppcl_ds.data.stored import EMPTY, Stored, Texts
from ppcl_ds.data.text import Tree, leaves
from ppcl_ds.teacher.encoding import Encoder
from ppcl_ds.teacher.pipeline_files import open_pipeline
from tests.conftest import TEACHERS
from tests.pipelines import OPTIONS, make_pipeline

SIZE = Size(8, 8)
EVERY = pytest.mark.parametrize("family", TEACHERS)
CAPTIONS = ["a tiny two", "three", "zero"]


def sample(latents: Tensor) -> Stored:
    """One with two captions, a source image, and a text of its own for no caption."""

    def prompt(value: float) -> Prompt:
        text = {"embeds": torch.full((1, 3, 2), value), "mask": None, "lengths": [3]}
        return Prompt(((text, torch.full((1, 4), value)), [torch.arange(2)]), (torch.full((1, 2), value),), (48, 32))

    return Stored(latents, Size(16, 32, 5), {"": prompt(1), "caption_zh": prompt(2), EMPTY: prompt(3)})


def assert_same(own: Tree, other: Tree, rtol: float = 0, atol: float = 0) -> None:
    mine, theirs = dict(leaves(own)), dict(leaves(other))
    assert mine.keys() == theirs.keys()
    for path, leaf in theirs.items():
        if isinstance(leaf, Tensor):
            torch.testing.assert_close(mine[path], leaf, rtol=rtol, atol=atol)
        else:
            assert mine[path] == leaf


@pytest.mark.parametrize("shape", [(4, 8, 16), (4, 2, 8, 16)])
def test_a_sample_comes_back_in_bfloat16(shape: tuple[int, ...]) -> None:
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = sample(latents)
    read = Stored.read(stored.write())
    assert read.latents.dtype == torch.float32
    assert torch.equal(read.latents, latents.bfloat16().float())
    assert read.size == replace(stored.size, source=(48, 32))
    assert read.prompts.keys() == stored.prompts.keys()
    for name, prompt in stored.prompts.items():
        assert read.prompts[name].source == (48, 32)
        assert_same(read.prompts[name].text, tuple(prompt.text))
        assert_same(read.prompts[name].images, tuple(prompt.images))


def test_the_same_sample_is_the_same_bytes() -> None:
    assert len({sample(torch.ones(1, 2, 2)).write() for _ in range(20)}) == 1


def test_a_sample_takes_no_more_room_than_its_own_tensors() -> None:
    batch = torch.zeros(32, 4, 8, 16)
    assert len(sample(batch[3]).write()) == len(sample(batch[3].clone()).write()) < batch.numel()
    assert sample(batch[3].transpose(1, 2)).write() == sample(torch.zeros(4, 16, 8)).write(), (
        "however it lies in memory"
    )


@given(data=st.data())
def test_damage_of_a_sample_is_told_of_or_harmless(data: st.DataObject) -> None:
    whole = sample(torch.ones(1, 2, 2)).write()
    damaged = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    cut = bytes(damaged[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    try:
        Stored.read(cut)
    except ValueError as fault:
        assert str(fault).isprintable()  # noqa: PT017
    if len(cut) < len(whole):
        with pytest.raises(ValueError, match=r".+"):
            Stored.read(cut)


# What all samples share


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Encoder]:
    """Family -> its tiny pipeline's encoders."""
    root = tmp_path_factory.mktemp("pipelines")
    made: dict[str, Encoder] = {}

    def make(family: str) -> Encoder:
        if family not in made:
            make_pipeline(family, root / family)
            made[family] = Encoder(root / family, options=OPTIONS[family])
        return made[family]

    return make


def stock_text(family: str, folder: Path, captions: Sequence[str], guided: bool = False) -> Tree:
    """What the stock `encode_prompt` returns for captions together, call by call, each family written out."""
    names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    pipe: Any = open_pipeline(folder, [name for name in names if (folder / name).exists()])
    captions, nothing = list(captions), [""] * len(captions)
    with torch.no_grad():
        if family == "qwen":
            return tuple(pipe.encode_prompt(each) for each in ([captions, nothing] if guided else [captions]))
        if family == "flux":
            every = [captions, nothing] if guided else [captions]
            return tuple(pipe.encode_prompt(each, None, max_sequence_length=4) for each in every)
        return (
            pipe.encode_prompt(captions, captions, captions, do_classifier_free_guidance=guided, max_sequence_length=4),
        )


@EVERY
def test_the_texts_of_a_pipeline_say_how_captions_are_joined(family: str, encoder: Callable[[str], Encoder]) -> None:
    """Learned from two captions, and right for three others."""
    own = encoder(family)
    texts = Texts.read(own.texts(SIZE))
    assert_same(tuple(texts.empty.text), stock_text(family, own.call.folder, [""]), rtol=1e-2, atol=1e-2)
    assert texts.joining.padded
    joined = texts.joining([tuple(own.prompt(caption, SIZE).text) for caption in CAPTIONS])
    assert_same(joined, stock_text(family, own.call.folder, CAPTIONS), rtol=0, atol=1e-5)


@EVERY
def test_what_is_read_with_guidance_is_put_together_from_parts(family: str, encoder: Callable[[str], Encoder]) -> None:
    own = encoder(family)
    texts = Texts.read(own.texts(SIZE))
    assert texts.guiding is not None
    caption = texts.joining([tuple(own.prompt(caption, SIZE).text) for caption in CAPTIONS])
    empty = texts.joining([tuple(own.prompt("", SIZE).text)] * len(CAPTIONS))
    guided = texts.guiding(caption, empty)
    assert_same(guided, stock_text(family, own.call.folder, CAPTIONS, guided=True), rtol=0, atol=1e-5)


def test_what_guidance_reads_besides_is_noticed() -> None:
    caption, empty = (torch.ones(1, 2),), (torch.zeros(1, 2),)
    guiding = Guiding.learn(caption, empty, ((caption[0], "word"), [empty[0], None]))
    other = torch.full((2, 2), 5.0), torch.full((2, 2), 6.0)
    assert_same(guiding((other[0],), (other[1],)), ((other[0], "word"), [other[1], None]))
    with pytest.raises(ValueError, match=r"^with guidance it also reads a tensor of \(1, 3\)$"):
        Guiding.learn(caption, empty, (caption[0], torch.ones(1, 3)))


def test_lists_with_an_entry_a_caption_are_put_together_whole() -> None:
    """Z-Image: a list of tensors of unlike lengths for the captions, and one for those to stay away from."""
    one, other, nothing = torch.ones(3, 2), torch.full((5, 2), 2.0), torch.zeros(1, 2)
    guiding = Guiding.learn((([one], []),), (([nothing], []),), (([one], [nothing]),))
    guided = guiding((([one, other], []),), (([nothing, nothing], []),))
    assert_same(guided, (([one, other], [nothing, nothing]),))


def test_without_an_example_of_guidance_nobody_says_how_it_is_read() -> None:
    def words(count: int, captions: int = 1) -> Prompt:
        embeds = torch.zeros(captions, count, 2)
        for row, own in enumerate([2, 3][-captions:] if captions > 1 else [count]):
            embeds[row, :own] = own
        return Prompt((embeds,))

    texts = Texts.read(Texts.write(words(2), words(3), words(3, captions=2), None))
    assert texts.guiding is None
    assert texts.joining.padded
    assert torch.equal(texts.empty.text[0], torch.full((1, 2, 2), 2.0))


def test_texts_that_are_damaged_are_told_of(encoder: Callable[[str], Encoder]) -> None:
    whole = encoder("qwen").texts(SIZE)
    with pytest.raises(ValueError, match=r"^damaged"):
        Texts.read(whole[: len(whole) // 2])
    tensors = safetensors.torch.load(whole)
    metadata = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    words = json.loads(metadata["words"])
    for name in ("empty", "long", "both"):
        left = {key: word for key, word in words.items() if key != name}
        with pytest.raises(ValueError, match=r"^it is not complete$"):
            Texts.read(safetensors.torch.save(tensors, {"words": json.dumps(left)}))
    with pytest.raises(ValueError, match="become one of"):
        Texts.read(safetensors.torch.save({**tensors, "both.0": torch.ones(5, 1, 2)}, metadata))
