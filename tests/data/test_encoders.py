"""Promises of the encoders that need no downloads, and of the recipe's choice among all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppcl_ds.data.batch import Prompts
from ppcl_ds.data.encoders import PixelEncoder, TableTextEncoder, image_encoder, text_encoder, without_padding
from ppcl_ds.sections import CaptionEncoding, Data, ImageEncoding


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_value_survives_encoding_storage_and_decoding(channels: int) -> None:
    images = [picture(16, 12), picture(16, 12).transpose(Image.Transpose.ROTATE_180)]
    encoder = PixelEncoder(channels)
    latents = encoder.encode(images)
    assert latents.shape == (2, channels, 12, 16)
    assert latents.dtype == torch.float32
    pixels = np.stack([np.array(image.convert("RGB" if channels == 3 else "L")) for image in images])
    expected = pixels.astype(np.float32).reshape(2, 12, 16, channels).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(latents.numpy(), expected / 127.5 - 1, atol=1e-6)
    decoded = (encoder.decode(latents.bfloat16().float()) + 1) * 127.5
    np.testing.assert_array_equal(decoded.round().numpy(), expected)


def test_decoded_pictures_stay_within_range() -> None:
    decoded = PixelEncoder(1).decode(torch.full((1, 1, 4, 4), 3.0))
    assert decoded.max() == 1


def test_the_same_word_is_the_same_vector_in_every_caption_and_every_process() -> None:
    first = TableTextEncoder(16).encode(["a seven", "Seven!"])
    assert torch.equal(first.embeds[0, 1], first.embeds[1, 0])
    assert not torch.equal(first.embeds[0, 0], first.embeds[0, 1])
    program = "from ppcl_ds.data.encoders import *; print(TableTextEncoder(16).encode(['seven']).embeds[0, 0].tolist())"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(first.embeds[1, 0].tolist())


def test_word_vectors_are_standard_normal_and_survive_bfloat16() -> None:
    prompts = TableTextEncoder(4096, pooled_width=64).encode(["one two three"])
    assert prompts.embeds.mean().abs() < 0.05
    assert abs(prompts.embeds.std().item() - 1) < 0.05
    assert prompts.pooled is not None
    for values in (prompts.embeds, prompts.pooled):
        assert torch.equal(values, values.bfloat16().float())


def test_without_a_fixed_length_captions_keep_their_own_and_the_mask_says_so() -> None:
    prompts = TableTextEncoder(8).encode(["a handwritten seven", "seven", "", "?!"])
    assert prompts.embeds.shape == (4, 3, 8)
    assert prompts.mask is not None
    assert prompts.mask.tolist() == [[True] * 3, [True, False, False], [True, False, False], [True, False, False]]
    assert not prompts.embeds[~prompts.mask].any()
    assert torch.equal(prompts.embeds[2, 0], prompts.embeds[3, 0]), "a caption without words is the empty caption"
    assert prompts.embeds[2, 0].any(), "the empty caption is a token of its own, not padding"


def test_with_a_fixed_length_captions_are_padded_or_cut_and_have_no_mask() -> None:
    prompts = TableTextEncoder(8, max_tokens=2).encode(["one", "one two three"])
    assert prompts.mask is None
    assert prompts.embeds.shape == (2, 2, 8)
    assert not prompts.embeds[0, 1].any()
    assert torch.equal(prompts.embeds[1], TableTextEncoder(8).encode(["one two"]).embeds[0])


def test_the_pooled_embedding_is_the_mean_of_the_words() -> None:
    encoder = TableTextEncoder(8, pooled_width=4)
    single = encoder.encode(["one", "two"]).pooled
    both = encoder.encode(["two one"]).pooled
    assert single is not None
    assert both is not None
    torch.testing.assert_close(both[0], single.mean(dim=0), atol=0.02, rtol=0.01)
    assert TableTextEncoder(8).encode(["one"]).pooled is None


def test_recipe_sections_choose_the_encoders(tmp_path: Path) -> None:
    data = Data(
        source="images",
        shards=tmp_path,
        images=ImageEncoding(channels=1, size=6),
        captions=CaptionEncoding(width=12, pooled_width=5, max_tokens=7),
    )
    assert image_encoder(data).encode([picture(6, 4)]).shape == (1, 1, 4, 6)
    prompts = text_encoder(data).encode(["one"])
    assert prompts.embeds.shape == (1, 7, 12)
    assert prompts.pooled is not None
    assert prompts.pooled.shape == (1, 5)


def test_a_prompt_is_stored_without_its_padding() -> None:
    masked = TableTextEncoder(8).encode(["one two three", "one"])
    short = without_padding(Prompts(masked.embeds[1:], masked.mask[1:] if masked.mask is not None else None))
    assert short.embeds.shape == (1, 1, 8)
    assert short.mask is not None
    assert short.mask.shape == (1, 1)
    padded = TableTextEncoder(8, pooled_width=4, max_tokens=5).encode(["one two"])
    stored = without_padding(padded)
    assert torch.equal(stored.embeds, padded.embeds[:, :2])
    assert stored.pooled is padded.pooled
    full = Prompts(torch.ones(1, 3, 2))
    assert torch.equal(without_padding(full).embeds, full.embeds)
    assert without_padding(Prompts(torch.zeros(1, 3, 2))).embeds.shape == (1, 1, 2)
