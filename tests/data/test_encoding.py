"""Captions and images are encoded as the stock pipelines encode them, and decoded as they decode."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.text import Tree, leaves
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.encoding import Decoder, Encoder
from tests.families.pipelines import PIPELINES, make_pipeline
from tests.families.pipelines.parts import CHANNELS
from tests.pipelines import make_pipeline as make_tiny

FAMILIES = ["flux", "sd3", "qwen_image", "wan"]
EVERY = pytest.mark.parametrize("family", FAMILIES)
VIDEO = ("qwen_image", "wan")
"""Families whose VAE reads clips."""
SCALE = {"flux": 2, "sd3": 2, "qwen_image": 2, "wan": 4}
"""Pixels a latent."""
TOKENS = {"flux": 32, "sd3": 32, "wan": 16}
"""Of every caption; those of Qwen-Image have their own length."""
CAPTIONS = ["a tiny red cat", "", "zero one two three red blue cat dog", "a dog &amp; a cat"]
SIZE = Size(16, 32)


def options(family: str) -> dict[str, Any]:
    given = PIPELINES[family].call.items()
    own = {key: value for key, value in given if key in ("max_sequence_length", "guidance_scale", "true_cfg_scale")}
    return own | ({"max_sequence_length": TOKENS[family]} if family in TOKENS else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> its tiny pipeline folder, made on first use."""
    root = tmp_path_factory.mktemp("pipelines")

    def make(family: str) -> Path:
        if not (root / family).exists():
            make_pipeline(family, root / family)
        return root / family

    return make


@pytest.fixture(scope="module")
def stock(folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """Family -> the stock pipeline, loaded whole as its users load it."""
    loaded: dict[str, Any] = {}

    def load(family: str) -> Any:
        if family not in loaded:
            loaded[family] = diffusers.DiffusionPipeline.from_pretrained(folder(family), local_files_only=True)
            loaded[family].set_progress_bar_config(disable=True)
        return loaded[family]

    return load


@pytest.fixture(scope="module")
def encoder(folder: Callable[[str], Path]) -> Callable[[str], Encoder]:
    made: dict[str, Encoder] = {}

    def make(family: str) -> Encoder:
        if family not in made:
            made[family] = Encoder(folder(family), options=options(family))
        return made[family]

    return make


def stock_text(family: str, pipeline: Any, captions: Sequence[str]) -> Tree:
    """What the stock pipeline's own method returns, each family written out."""
    with torch.no_grad():
        if family == "qwen_image":
            return pipeline.encode_prompt(list(captions))
        if family == "flux":
            return pipeline.encode_prompt(list(captions), None, max_sequence_length=TOKENS[family])
        if family == "sd3":
            given = [list(captions)] * 3
            return pipeline.encode_prompt(*given, do_classifier_free_guidance=False, max_sequence_length=TOKENS[family])
        return pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, max_sequence_length=TOKENS[family]
        )


def assert_alike(ours: Tree, theirs: Tree) -> None:
    own, other = dict(leaves(ours)), dict(leaves(theirs))
    assert own.keys() == other.keys()
    for path, leaf in other.items():
        assert type(own[path]) is type(leaf)
        if isinstance(leaf, Tensor):
            torch.testing.assert_close(own[path], leaf, atol=1e-6, rtol=0, check_dtype=leaf.is_floating_point())


def images(count: int = 3, size: Size = SIZE) -> list[Image.Image]:
    random = np.random.default_rng(0)
    shape = size.height, size.width, 3
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


def stills(pictures: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """Clips of one frame."""
    return [[picture] for picture in pictures]


def pixels_of(pictures: Sequence[Image.Image]) -> Tensor:
    """(B, 3, height, width) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def stock_latents(family: str, vae: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.encode(pixels.unsqueeze(2) if family in VIDEO else pixels).latent_dist.mode()


@EVERY
def test_captions_are_encoded_as_the_stock_pipeline_does(
    family: str, encoder: Callable[[str], Encoder], stock: Callable[[str], Any]
) -> None:
    pipeline, seen = stock(family), set()
    for caption in CAPTIONS:
        prompt = encoder(family).prompt(caption, SIZE)
        [text] = prompt.text
        assert_alike(text, stock_text(family, pipeline, [caption]))
        assert not prompt.images
        assert prompt.source is None
        if family in TOKENS:
            assert text[0].shape[1] == TOKENS[family] + (77 if family == "sd3" else 0)
        seen.add(tuple(text[0].flatten().tolist()))
    assert len(seen) == len(CAPTIONS), "each has a prompt of its own"


@EVERY
def test_images_are_what_the_vae_says_of_them(
    family: str, encoder: Callable[[str], Encoder], stock: Callable[[str], Any]
) -> None:
    given = images()
    latents = encoder(family).latents(stills(given))
    height, width = SIZE.height // SCALE[family], SIZE.width // SCALE[family]
    assert latents.shape == (3, CHANNELS, *((1,) if family in VIDEO else ()), height, width)
    torch.testing.assert_close(latents, stock_latents(family, stock(family).vae, pixels_of(given)), atol=1e-5, rtol=0)
    assert torch.equal(encoder(family).latents(stills(given)), latents), "the mean, not a sample"
    for number, image in enumerate(given):
        torch.testing.assert_close(encoder(family).latents([[image]])[0], latents[number], atol=1e-6, rtol=0)


@EVERY
def test_latents_are_decoded_as_the_vae_decodes(
    family: str, encoder: Callable[[str], Encoder], stock: Callable[[str], Any], folder: Callable[[str], Path]
) -> None:
    latents = encoder(family).latents(stills(images()))
    with torch.no_grad():
        expected = stock(family).vae.decode(latents).sample
    torch.testing.assert_close(Decoder(folder(family))(latents), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0


def test_pixels_come_back_from_a_vae_that_keeps_them(tmp_path: Path) -> None:
    make_tiny("qwen", tmp_path)
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    latents = Encoder(tmp_path).latents([[picture.convert("RGB")]])
    assert latents.shape == (1, 1, 16, 16)
    decoded = (Decoder(tmp_path)(latents.bfloat16().float()) + 1) * 127.5
    np.testing.assert_allclose(decoded[0, 0].numpy(), np.asarray(picture), atol=0.5)


def test_a_picture_to_edit_is_encoded_beside_the_caption(tmp_path: Path) -> None:
    """As FLUX Kontext does: its size is the picture's own, and its latents are the mode."""
    make_pipeline("flux_kontext", tmp_path)
    call = PIPELINES["flux_kontext"].call
    own = {key: call[key] for key in ("max_sequence_length", "guidance_scale", "max_area", "_auto_resize")}
    assert not Encoder(tmp_path, options=own).reads_sources(Size(16, 16)), "it also draws from words alone"
    with pytest.raises(UserError, match=r"teacher.options: image can only be `source`"):
        Encoder(tmp_path, options=own | {"image": "cat.png"})
    encoder = Encoder(tmp_path, options=own | {"image": "source"})
    assert encoder.reads_sources(Size(16, 16))
    [source] = images(1)
    prompt = encoder.prompt("a tiny red cat", Size(16, 16), source)
    assert prompt.source == source.size == (32, 16)
    pipe = diffusers.FluxKontextPipeline.from_pretrained(tmp_path, local_files_only=True)
    with torch.no_grad():
        expected = pipe.encode_prompt(["a tiny red cat"], None, max_sequence_length=32)
        [found] = prompt.images
    assert_alike(prompt.text[0], expected)
    [tensor] = [leaf for _, leaf in leaves(found) if isinstance(leaf, Tensor)]
    modes = stock_latents("flux", pipe.vae, pixels_of([source]))
    means = tensor[:, : modes.shape[1]]  # a distribution is kept by its parameters, if not by its mean alone
    torch.testing.assert_close(means, modes, atol=1e-5, rtol=0)


def test_pipelines_of_words_alone_read_no_source(encoder: Callable[[str], Encoder]) -> None:
    for family in FAMILIES:
        assert not encoder(family).reads_sources(SIZE)
    with pytest.raises(UserError, match="FluxPipeline takes no source image"):
        encoder("flux").prompt("a cat", SIZE, images(1)[0])
    with pytest.raises(UserError, match=r"teacher.options: FluxPipeline takes no argument 'image'"):
        Encoder(encoder("flux").call.folder, options={"image": "source"})


@EVERY
def test_captions_that_are_longer_than_it_reads_are_counted(family: str, encoder: Callable[[str], Encoder]) -> None:
    assert encoder(family).longer(CAPTIONS[:2]) == 0
    few, many = " ".join(["red"] * 4), " ".join(["red"] * 1500)
    assert encoder(family).longer([few, many, "", many]) == 2
    if family in TOKENS:  # Qwen-Image refuses none and cuts none
        lengths = [encoder(family).prompt(text, SIZE).text[0][0].shape[1] for text in (many, f"{many} blue")]
        assert lengths[0] == lengths[1], "it is cut"


def test_a_tokenizer_that_is_none_counts_nothing(tmp_path: Path) -> None:
    make_tiny("qwen", tmp_path)
    assert Encoder(tmp_path).longer(["word " * 5000]) == 0


@EVERY
def test_sides_that_it_does_not_draw_are_refused(family: str, encoder: Callable[[str], Encoder]) -> None:
    with pytest.raises(UserError, match=r"17|multiples|divisible"):
        encoder(family).latents(stills(images(1, Size(16, 17))))


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path) -> None:
    for name in ("none", "empty", "list"):
        if name != "none":
            (tmp_path / name).mkdir()
        if name == "list":
            (tmp_path / name / "model_index.json").write_text("[]")
        for kind in (Encoder, Decoder):
            with pytest.raises(UserError, match=str(tmp_path / name)) as caught:
                kind(tmp_path / name)
            assert str(caught.value).isprintable()


@pytest.mark.parametrize("part", ["vae", "text_encoder_2"])
def test_a_component_that_is_damaged_or_left_out_is_named(
    part: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = tmp_path / "pipeline"
    shutil.copytree(folder("sd3"), copy)
    [weights] = (copy / part).glob("*.safetensors")
    weights.write_bytes(b"cut short")
    with pytest.raises(UserError, match=rf"{copy}.*{part}") as caught:
        Encoder(copy)
    assert str(caught.value).isprintable()
    weights.unlink()
    with pytest.raises(UserError, match=rf"{copy}.*{part}"):
        Encoder(copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {part: [None, None]}))
    with pytest.raises(UserError, match=str(copy)):
        Encoder(copy).prompt("a cat", SIZE) if part != "vae" else Encoder(copy)


def test_a_prompt_moves_with_all_that_is_in_it() -> None:
    ids = torch.arange(3)
    prompt = Prompt(((torch.ones(1, 2), [ids, None]),), ({"a": torch.zeros(2)},), (4, 6))
    moved = prompt.to(torch.bfloat16)
    assert [tensor.dtype for tensor in moved.tensors()] == [torch.bfloat16, torch.int64, torch.bfloat16]
    assert moved.source == (4, 6)
    assert moved.text[0][1][1] is None
