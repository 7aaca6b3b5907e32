"""Promises of the encoders of a pipeline folder: the numbers of the stock pipelines, and only what is needed loaded."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ppcl_ds.data.batch import Prompts
from ppcl_ds.data.encoders import image_encoder, text_encoder, without_padding
from ppcl_ds.data.pipelines import FAMILIES, PipelineTextEncoder, VaeEncoder
from ppcl_ds.errors import UserError
from ppcl_ds.sections import CaptionEncoding, Data, ImageEncoding
from tests.data.tiny_pipelines import CHANNELS, POOLED, SCALE, WIDTH, make_pipeline

EVERY = pytest.mark.parametrize("family", ["qwen", "flux", "sd3", "wan"])
UNMASKED = pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
VIDEO = ("qwen", "wan")
TOKENS = {"qwen": 0, "flux": 12, "sd3": 77 + 9, "wan": 12}
CAPTIONS = ["a tiny red cat", "", "zero one two three red blue cat dog a tiny image by the color", "a dog &amp; a cat"]


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
            loaded[family] = diffusers.DiffusionPipeline.from_pretrained(folder(family))
            loaded[family].set_progress_bar_config(disable=True)
        return loaded[family]

    return load


def section(family: str, **changes: int) -> CaptionEncoding:
    pooled = POOLED if family in ("flux", "sd3") else 0
    values = {"width": WIDTH, "pooled_width": pooled, "max_tokens": TOKENS[family]}
    return CaptionEncoding.model_validate({"encoder": "pipeline"} | values | changes)


def stock_prompts(family: str, pipeline: Any, captions: list[str]) -> Prompts:
    """What the stock pipeline encodes, each family written out."""
    with torch.no_grad():
        if family == "qwen":
            embeds, mask = pipeline.encode_prompt(captions)
            return Prompts(embeds, torch.ones(embeds.shape[:2]).bool() if mask is None else mask.bool())
        if family == "flux":
            embeds, pooled, _ = pipeline.encode_prompt(captions, None, max_sequence_length=12)
            return Prompts(embeds, None, pooled)
        if family == "sd3":
            embeds, _, pooled, _ = pipeline.encode_prompt(captions, captions, captions, max_sequence_length=9)
            return Prompts(embeds, None, pooled)
        return Prompts(pipeline.encode_prompt(captions, max_sequence_length=12)[0])


def assert_alike(ours: Prompts, theirs: Prompts) -> None:
    torch.testing.assert_close(ours.embeds, theirs.embeds, atol=1e-6, rtol=0)
    assert (ours.mask is None) == (theirs.mask is None)
    assert (ours.pooled is None) == (theirs.pooled is None)
    if ours.mask is not None and theirs.mask is not None:
        assert ours.mask.dtype == torch.bool
        assert torch.equal(ours.mask, theirs.mask)
    if ours.pooled is not None and theirs.pooled is not None:
        torch.testing.assert_close(ours.pooled, theirs.pooled, atol=1e-6, rtol=0)


def images(count: int = 3, width: int = 32, height: int = 16) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


@EVERY
def test_captions_are_encoded_as_the_stock_pipeline_does(
    family: str, folder: Callable[[str], Path], stock: Callable[[str], Any]
) -> None:
    encoder = PipelineTextEncoder(folder(family), section(family))
    together = encoder.encode(CAPTIONS)
    assert_alike(together, stock_prompts(family, stock(family), CAPTIONS))
    for number, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        assert_alike(alone, stock_prompts(family, stock(family), [caption]))
        assert_alike(together.row(number), alone)
        assert alone.embeds.abs().sum() > 0
    if TOKENS[family]:
        assert together.embeds.shape == (4, TOKENS[family], WIDTH)


def test_qwen_image_captions_keep_their_own_length(folder: Callable[[str], Path]) -> None:
    encoder = PipelineTextEncoder(folder("qwen"), section("qwen"))
    prompts = encoder.encode(["a tiny red cat", ""])
    assert prompts.mask is not None
    after = 5  # <|im_end|>, a line's end, <|im_start|>, assistant, a line's end
    assert prompts.mask.sum(dim=1).tolist() == [4 + after, after]
    assert without_padding(prompts.row(1)).embeds.shape == (1, after, WIDTH)
    with pytest.raises(UserError, match="max_tokens is 7, but QwenImagePipeline has a text mask"):
        PipelineTextEncoder(folder("qwen"), section("qwen", max_tokens=7))


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_captions_that_are_cut_do_not_fill_the_screen(
    family: str, folder: Callable[[str], Path], stock: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    diffusers_log = logging.getLogger("diffusers")  # does not propagate to where pytest listens
    diffusers_log.addHandler(caplog.handler)
    long = ["a tiny red cat " * 40] * 3
    logging.getLogger(type(stock(family)).__module__).setLevel(logging.WARNING)
    stock_prompts(family, stock(family), long)
    before = caplog.text.count("was truncated")
    assert before
    encoder = PipelineTextEncoder(folder(family), section(family))
    encoder.encode(long)  # transformers says once for each tokenizer that a caption is long
    assert caplog.text.count("was truncated") == before
    caplog.clear()
    encoder.encode(long)
    assert not caplog.records
    diffusers_log.removeHandler(caplog.handler)


def test_wan_captions_are_stored_without_their_zeros_and_others_whole(folder: Callable[[str], Path]) -> None:
    for family, length in (("wan", 5), ("flux", 12), ("sd3", 86)):
        prompt = PipelineTextEncoder(folder(family), section(family)).encode(["a tiny red cat"])
        stored = without_padding(prompt)
        assert stored.embeds.shape == (1, length, WIDTH)
        assert torch.equal(stored.embeds, prompt.embeds[:, :length])
        assert not prompt.embeds[:, length:].any()


@pytest.mark.parametrize("number_format", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@EVERY
def test_everything_comes_back_as_float32(
    family: str, number_format: torch.dtype, folder: Callable[[str], Path]
) -> None:
    prompts = PipelineTextEncoder(folder(family), section(family), dtype=number_format).encode(CAPTIONS)
    vae = VaeEncoder(folder(family), 16, dtype=number_format)
    latents = vae.encode(images())
    assert prompts.embeds.dtype == latents.dtype == vae.decode(latents).dtype == torch.float32
    assert next(vae.vae.parameters()).dtype == number_format


def stock_latents(family: str, pipeline: Any, pixels: Tensor) -> Tensor:
    """(B, 3, height, width) in [-1, 1] -> (B, C, H, W) as a stock pipeline that reads images makes them of the mode."""
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    generator = torch.Generator()
    with torch.no_grad():
        if family == "qwen":
            edit = diffusers.QwenImageEditPipeline(processor=None, **parts)
            return edit._encode_vae_image(pixels.unsqueeze(2), generator).squeeze(2)
        if family == "flux":
            return diffusers.FluxKontextPipeline(**parts)._encode_vae_image(pixels, generator)
        if family == "sd3":
            return (pipeline.vae.encode(pixels).latent_dist.mode() - 0.12) * 0.36
        to_video = diffusers.WanImageToVideoPipeline(image_encoder=None, image_processor=None, **parts)
        height, width = pixels.shape[2:]
        made = [to_video.prepare_latents(p[None], 1, CHANNELS, height, width, 1, torch.float32)[1] for p in pixels]
        return torch.cat(made)[:, -CHANNELS:, 0]


@EVERY
def test_images_are_encoded_as_the_stock_pipelines_do(
    family: str, folder: Callable[[str], Path], stock: Callable[[str], Any]
) -> None:
    encoder = VaeEncoder(folder(family), 16)
    given = images()
    latents = encoder.encode(given)
    assert latents.shape == (3, CHANNELS, 16 // SCALE, 32 // SCALE)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in given]).float() / 127.5 - 1
    torch.testing.assert_close(latents, stock_latents(family, stock(family), pixels), atol=1e-6, rtol=0)
    assert torch.equal(encoder.encode(given), latents), "the mode, not a sample"
    for number, image in enumerate(given):
        assert torch.equal(encoder.encode([image])[0], latents[number])


@pytest.mark.parametrize("family", VIDEO)
def test_latents_are_normalised_by_the_vaes_statistics(
    family: str, folder: Callable[[str], Path], stock: Callable[[str], Any]
) -> None:
    pixels = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    image = Image.fromarray(((pixels[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    pixels = ((pixels + 1) * 127.5).round() / 127.5 - 1
    with torch.no_grad():
        mode = stock(family).vae.encode(pixels).latent_dist.mode()[:, :, 0]
    mean, std = torch.tensor([0.1, -0.2, 0.3, -0.4]), torch.tensor([0.5, 0.7, 1.1, 1.3])
    expected = (mode - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1)
    torch.testing.assert_close(VaeEncoder(folder(family), 16).encode([image]), expected, atol=1e-6, rtol=0)


@EVERY
def test_latents_are_decoded_as_the_stock_pipeline_ends(
    family: str, folder: Callable[[str], Path], stock: Callable[[str], Any]
) -> None:
    pipeline = stock(family)
    options: dict[str, Any] = {"num_inference_steps": 1, "height": 16, "width": 32, "max_sequence_length": 16}
    options |= {"num_frames": 1} if family == "wan" else {}
    options |= {"true_cfg_scale": 1.0} if family in ("qwen", "flux") else {"guidance_scale": 1.0}

    def drawn(output_type: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a tiny red cat", generator=generator, output_type=output_type, return_dict=False, **options)[0]

    latents = drawn("latent")
    if family in ("qwen", "flux"):
        latents = pipeline._unpack_latents(latents, 16, 32, SCALE)
    if latents.ndim == 5:  # (B, C, 1, H, W)
        latents = latents.squeeze(2)
    pictures = VaeEncoder(folder(family), 16).decode(latents)
    expected = drawn("pt").reshape(1, 3, 16, 32)
    torch.testing.assert_close((pictures + 1) / 2, expected, atol=1e-6, rtol=0)
    assert pictures.std() > 0


@EVERY
def test_decoding_undoes_the_normalisation_and_stays_within_range(
    family: str, folder: Callable[[str], Path], stock: Callable[[str], Any]
) -> None:
    encoder, vae = VaeEncoder(folder(family), 16), stock(family).vae
    given = images()
    latents = encoder.encode(given)
    pixels = encoder.processor.preprocess(given)
    with torch.no_grad():
        mode = vae.encode(pixels.unsqueeze(2) if family in VIDEO else pixels).latent_dist.mode()
        expected = vae.decode(mode).sample.clamp(-1, 1).reshape(3, 3, 16, 32)
    pictures = encoder.decode(latents)
    torch.testing.assert_close(pictures, expected, atol=1e-5, rtol=0)
    for number in range(3):
        assert torch.equal(encoder.decode(latents[number : number + 1])[0], pictures[number])
    assert encoder.decode(1e3 * latents).abs().max() <= 1


@EVERY
def test_only_what_is_wanted_is_read(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    whole, texts, picture = folder(family), tmp_path / "texts", tmp_path / "picture"
    for half, prefixes in ((texts, ("text_encoder", "tokenizer")), (picture, ("vae",))):
        half.mkdir()
        shutil.copy(whole / "model_index.json", half)
        for part in whole.iterdir():
            if part.name.startswith(prefixes):
                shutil.copytree(part, half / part.name)
    assert VaeEncoder(picture, 16).encode(images()).shape == (3, CHANNELS, 8, 16)
    assert len(PipelineTextEncoder(texts, section(family)).encode(CAPTIONS).embeds) == 4
    with pytest.raises(UserError, match="vae is missing"):
        VaeEncoder(texts, 16)
    with pytest.raises(UserError, match="text_encoder is missing"):
        PipelineTextEncoder(picture, section(family))


@EVERY
def test_the_recipe_chooses_them(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    data = Data(
        source="images",
        shards=tmp_path,
        pipeline=folder(family),
        images=ImageEncoding(encoder="vae", size=64),
        captions=section(family),
    )
    assert isinstance(image_encoder(data), VaeEncoder)
    assert text_encoder(data, "cpu").encode([""]).embeds.shape[-1] == WIDTH


@UNMASKED
def test_families_without_a_text_mask_need_a_length(family: str, folder: Callable[[str], Path]) -> None:
    usual = {"flux": "512", "sd3": "333", "wan": "512"}[family]
    with pytest.raises(UserError, match=rf"max_tokens is 0.*{usual} is usual"):
        PipelineTextEncoder(folder(family), section(family, max_tokens=0))


def test_sd3_needs_more_tokens_than_clip_has(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"max_tokens is 77.*333 is usual"):
        PipelineTextEncoder(folder("sd3"), section("sd3", max_tokens=77))


@pytest.mark.parametrize(
    ("family", "key", "given", "true"),
    [("qwen", "width", 3584, WIDTH), ("flux", "pooled_width", 0, POOLED), ("wan", "pooled_width", 8, 0)],
)
def test_widths_that_are_not_the_text_encoders_are_named(
    family: str, key: str, given: int, true: int, folder: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match=rf"data.captions.{key} is {given}, but .* to {true}$"):
        PipelineTextEncoder(folder(family), section(family, **{key: given}))


@EVERY
def test_sides_that_the_vae_cannot_encode_are_refused(family: str, folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"data.images.step is 3, but .* multiples of"):
        VaeEncoder(folder(family), 3)
    with pytest.raises(UserError, match=r"33 x 16 pixels: sides must be multiples of"):
        VaeEncoder(folder(family), 16).encode(images(width=33))


def test_a_folder_that_is_no_known_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path / 'none'}: no readable model_index.json"):
        VaeEncoder(tmp_path / "none", 16)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match=r"no readable model_index.json"):
        VaeEncoder(tmp_path, 16)
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    with pytest.raises(UserError, match=f"'LTXPipeline'; .*{', '.join(FAMILIES)}"):
        PipelineTextEncoder(tmp_path, section("qwen"))


def test_a_component_that_is_left_out_or_damaged_is_named(folder: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "pipeline"
    shutil.copytree(folder("sd3"), copy)
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"cannot load vae"):
        VaeEncoder(copy, 16)
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load vae") as caught:
        VaeEncoder(copy, 16)
    assert "\n" not in str(caught.value)
    (copy / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load .*text_encoder_2"):
        PipelineTextEncoder(copy, section("sd3"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    with pytest.raises(UserError, match=r"text_encoder_3 is missing"):
        PipelineTextEncoder(copy, section("sd3"))
