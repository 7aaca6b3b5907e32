"""The digits' pipeline: it encodes and draws as the demo does, and opens wherever a pipeline folder does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from einops import rearrange
from PIL import Image
from torch import Tensor

from ppcl_ds.data.batch import Size
from ppcl_ds.demo.pipeline import MODULE, DigitsPipeline, PixelVae, WordTable
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.pipeline_check import check
from ppcl_ds.teacher.pipeline_files import open_pipeline
from tests.calls import answer, arguments_by_hand, packed
from tests.conftest import TEACHERS

CAPTIONS = ["", "Seven", "a small, thin two", "seven seven"]
"""Of unlike length."""
SHIFT = 3.0
QWEN = TEACHERS["qwen"][0]
WHOLE = ("transformer", "vae", "text_encoder")

OUT_OF_A_FOLDER = """
import importlib.util, sys, diffusers, numpy, torch
assert importlib.util.find_spec("ppcl_ds") is None
pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
options = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(5)}
numpy.save(sys.argv[2], pipeline(["a thin two", "seven"], **options).images.numpy())
pipeline.save_pretrained(sys.argv[3])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline around a tiny transformer."""
    return saved(tmp_path_factory.mktemp("digits") / "teacher")


def saved(folder: Path, **captions: int) -> Path:
    torch.manual_seed(0)
    pipeline = DigitsPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=PixelVae(1),
        text_encoder=WordTable(16, **captions),
        transformer=QwenImageTransformer2DModel(**TEACHERS["qwen"][1]),
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(folder: Path) -> Any:
    return open_pipeline(folder, WHOLE)


def vector(word: str, width: int, table: str = "token") -> Tensor:
    """N(0, 1) of a word, the same on every machine; as bfloat16 keeps it."""
    seed = int(hashlib.sha256(f"{table}:{word}".encode()).hexdigest()[:16], 16)
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def encoded(captions: list[str]) -> tuple[Tensor, Tensor | None]:
    """Word by word; the empty caption is one token of its own."""
    split = [caption.lower().replace(",", "").split() or [""] for caption in captions]
    longest = max(map(len, split))
    rows = [[vector(word, 16) for word in words] + [torch.zeros(16)] * (longest - len(words)) for words in split]
    mask = torch.tensor([[place < len(words) for place in range(longest)] for words in split])
    return torch.stack([torch.stack(row) for row in rows]), None if mask.all() else mask


def noise_of(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grey(image: Image.Image) -> Tensor:
    """(1, 1, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("L"))).float()[None, None] / 127.5 - 1


@pytest.mark.parametrize(("pooled", "tokens"), [(0, 0), (8, 4), (8, 2)])
def test_words_are_vectors_and_captions_are_padded_or_cut(pooled: int, tokens: int) -> None:
    found = WordTable(16, pooled, tokens)(CAPTIONS)
    split = [[""], ["seven"], ["a", "small", "thin", "two"], ["seven", "seven"]]
    length = tokens or 4
    assert found.embeds.shape == (4, length, 16)
    for words, row in zip(split, found.embeds, strict=True):
        expected = [vector(word, 16) for word in words][:length]
        assert torch.equal(row[: len(expected)], torch.stack(expected))
        assert not row[len(expected) :].any()
    if tokens:
        assert found.mask is None
    else:
        assert found.mask is not None
        assert found.mask.sum(dim=1).tolist() == [1, 1, 4, 2]
    if not pooled:
        assert found.pooled is None
        return
    assert found.pooled is not None
    for words, row in zip(split, found.pooled, strict=True):
        mean = torch.stack([vector(word, pooled, "pooled") for word in words[:length]]).mean(dim=0)
        assert torch.equal(row, mean.bfloat16().float())


@pytest.mark.parametrize("channels", [1, 3])
def test_latents_are_the_pixels(channels: int) -> None:
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (8, 6, 3), dtype=np.uint8)) for _ in range(3)]
    coloured = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 127.5 - 1
    expected = coloured if channels == 3 else torch.cat([grey(image) for image in images])
    vae = PixelVae(channels)
    assert torch.equal(vae.encode(coloured).latent_dist.mode(), expected)
    assert torch.equal(vae.encode(expected, return_dict=False)[0].sample(), expected)
    assert torch.equal(vae.decode(expected * 2).sample, (expected * 2).clamp(-1, 1))


def test_pictures_come_back_as_they_were(pipe: Any) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    latents = pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mode()
    assert torch.equal(latents, grey(image))
    [again] = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pil")
    assert again == image


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_it_draws_by_euler_steps_with_guidance(pipe: Any, guidance: float) -> None:
    steps, state = 4, noise_of(len(CAPTIONS), 1, 8, 6, seed=3)

    def velocity(captions: list[str], sigma: float) -> Tensor:
        embeds, mask = encoded(captions)
        sigmas = torch.full((len(captions),), sigma)
        return answer(pipe.transformer, arguments_by_hand(QWEN, state, embeds, sigmas, mask, None))

    ladder = [1 - step / steps for step in range(steps)]
    ladder = [SHIFT * s / (1 + (SHIFT - 1) * s) for s in ladder] + [0.0]
    for here, there in pairwise(ladder):
        found = velocity(CAPTIONS, here)
        if guidance > 1:
            plain = velocity([""] * len(CAPTIONS), here)
            found = plain + guidance * (found - plain)
        state = state + (there - here) * unpacked(found)
    drawn = pipe(
        CAPTIONS,
        height=8,
        width=6,
        num_inference_steps=steps,
        true_cfg_scale=guidance,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    torch.testing.assert_close(drawn, state.clamp(-1, 1) / 2 + 0.5, rtol=0, atol=1e-5)


def unpacked(tokens: Tensor) -> Tensor:
    """Of 8 x 6 pixels."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=4, w=3, p=2, q=2)


def test_noise_levels_go_from_one_to_one_step_above_nothing(pipe: Any) -> None:
    asked: list[float] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    pipe("seven", num_inference_steps=4, true_cfg_scale=1.0)
    hook.remove()
    assert asked == pytest.approx([SHIFT * s / (1 + (SHIFT - 1) * s) for s in (1, 0.75, 0.5, 0.25)])


def test_several_captions_are_drawn_as_each_by_itself(pipe: Any) -> None:
    noise = packed(noise_of(2 * len(CAPTIONS), 1, 8, 8, seed=1))
    options: dict[str, Any] = {"num_inference_steps": 2, "true_cfg_scale": 2.0, "output_type": "latent"}
    unwanted = ["a thin one", "", "two", "seven"]
    together = pipe(CAPTIONS, unwanted, num_images_per_prompt=2, latents=noise, **options).images
    for place, (caption, negative) in enumerate(zip(CAPTIONS, unwanted, strict=True)):
        own = slice(2 * place, 2 * place + 2)
        alone = pipe(caption, negative, num_images_per_prompt=2, latents=noise[own], **options).images
        torch.testing.assert_close(together[own], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("output", "check"),
    [
        ("pil", lambda images: [(image.mode, image.size) for image in images] == [("L", (6, 8))] * 2),
        ("np", lambda images: images.shape == (2, 8, 6, 1) and 0 <= images.min() <= images.max() <= 1),
        ("pt", lambda images: images.shape == (2, 1, 8, 6) and 0 <= images.min() <= images.max() <= 1),
        ("latent", lambda images: images.shape == (2, 12, 4)),
    ],
)
def test_pictures_come_in_every_form(pipe: Any, output: str, check: Callable[[Any], bool]) -> None:
    options: dict[str, Any] = {"height": 8, "width": 6, "num_inference_steps": 1, "output_type": output}
    assert check(pipe(["one", "two"], **options).images)
    assert check(pipe("one", num_images_per_prompt=2, return_dict=False, **options)[0])


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [3]}, "prompt"),
        ({"prompt": "one", "negative_prompt": ["two"]}, "negative_prompt"),
        ({"prompt": ["one", "two"], "negative_prompt": ["two"]}, "negative_prompt"),
        ({"prompt": "one", "height": 7}, "height"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pipe: Any, given: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        pipe(**given)


def test_it_draws_where_ppcl_ds_is_not_installed(folder: Path, tmp_path: Path, without_us: Path, pipe: Any) -> None:
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    again = tmp_path / "again"
    done = subprocess.run(
        [without_us, "-c", OUT_OF_A_FOLDER, folder, tmp_path / "drawn.npy", again],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | cache,
    )
    assert done.returncode == 0, done.stderr
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    generator = torch.Generator().manual_seed(5)
    own = pipe(["a thin two", "seven"], generator=generator, **options).images
    assert np.array_equal(np.load(tmp_path / "drawn.npy"), own.numpy())
    indices = [json.loads((each / "model_index.json").read_text()) for each in (folder, again)]
    assert Path(indices[1].pop("_name_or_path")) == folder
    assert indices[0] == indices[1]
    assert {file.relative_to(again) for file in again.rglob("*")} == {
        file.relative_to(folder) for file in folder.rglob("*")
    }


def test_all_of_it_loads_in_another_dtype(folder: Path) -> None:
    pipe = open_pipeline(folder, WHOLE, dtype=torch.bfloat16)
    assert {getattr(pipe, name).dtype for name in WHOLE} == {torch.bfloat16}
    assert pipe("seven", num_inference_steps=1, output_type="latent").images.dtype == torch.bfloat16


def test_its_transformer_is_asked_as_it_was_trained(folder: Path) -> None:
    call, size = PipelineCall(folder, encodes="all"), Size(8, 6)
    latents = noise_of(1, 1, 8, 6, seed=0)
    assert call.latents_shape(size) == packed(latents).shape
    ladder = call.ladder(size)
    for caption in CAPTIONS[1:3]:
        prompt = call.encode(caption, size)
        check(call, prompt, size)
        for rung in (0, 500, len(ladder) - 1):
            found = call.arguments(packed(latents), rung, prompt, size)
            assert found.pop("return_dict") is False
            embeds, mask = encoded([caption])
            expected = arguments_by_hand(QWEN, latents, embeds, ladder.times[rung : rung + 1] / 1000, mask, None)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name


def test_latents_reach_the_vae_as_pixels(folder: Path) -> None:
    call, size = PipelineCall(folder), Size(8, 6)
    pixels = noise_of(1, 1, 8, 6, seed=0)
    torch.testing.assert_close(call.to_vae(size)(packed(pixels)), pixels)


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "teacher")
    for file in folder.rglob("*.py"):
        file.write_text("raise SystemExit('it was run')")
    open_pipeline(folder, WHOLE)  # our own classes are those of the package
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "vae" / "other.py").write_text("raise SystemExit('it was run')")
    for changes, word in [
        ({"vae": ["other", "PixelVae"]}, "other.py"),
        ({"vae": [MODULE, "OtherVae"]}, "OtherVae"),
        ({"vae": ["ppcl_ds.demo.other", "PixelVae"]}, "not known here"),
        ({"_class_name": ["ppcl_ds.demo.other", "DigitsPipeline"]}, "DigitsPipeline"),
        ({"_class_name": [MODULE, "PixelVae"]}, "PixelVae"),
        ({"_class_name": "DigitsPipeline"}, "DigitsPipeline"),
    ]:
        (folder / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(UserError, match=word):
            open_pipeline(folder, WHOLE)
