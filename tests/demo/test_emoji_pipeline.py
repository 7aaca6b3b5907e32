"""The emoji's pipeline: cosines for latents, BERT for captions, opened by stock diffusers and by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from scipy.fft import dctn
from torch import Tensor

from ppcl_ds.data.batch import Size
from ppcl_ds.demo.cosines import CosineVae
from ppcl_ds.demo.pipeline import MODULE
from ppcl_ds.demo.teacher import fresh_pipeline
from ppcl_ds.demo.testbeds import TESTBEDS, read_samples
from ppcl_ds.sections import DemoTeacher
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.pipeline_check import check
from ppcl_ds.teacher.pipeline_files import open_pipeline
from tests.calls import packed
from tests.demo.emoji_packages import WIDTH

CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": [4, 6, 6],
}
CAPTIONS = ["", "cat on red", "a drawing of tiger face on a blue background"]
WHOLE = ("transformer", "vae", "text_encoder")


def noise_of(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline whose transformer says something."""
    pipeline = fresh_pipeline(DemoTeacher(data="emoji", config=CONFIG, steps=1), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("emoji") / "teacher"
    pipeline.save_pretrained(folder)
    return folder


def test_latents_are_the_cosine_coefficients_of_low_frequencies() -> None:
    images = noise_of(2, 3, 8, 12, seed=0)
    found = CosineVae().encode(images).latent_dist.mode()
    assert found.shape == (2, 16, 2, 3)
    for row in range(2):
        for column in range(3):
            square = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy()
            every = dctn(square, type=2, norm="ortho", axes=(1, 2, 3))
            kept = [
                every[:, k, u, v] * (1 + u + v) / 2
                for k in range(3)
                for u in range(4)
                for v in range(4)
                if u + v < (4 if k == 0 else 2)
            ]
            np.testing.assert_allclose(found[:, :, row, column], np.stack(kept, axis=1), atol=1e-5)


def test_what_is_decoded_encodes_to_the_same_and_pictures_hardly_change(packages: Path) -> None:
    vae, images = CosineVae(), read_samples(TESTBEDS["emoji"])[0]
    latents = vae.encode(images).latent_dist.mode()
    again = vae.decode(latents).sample
    assert (again - images).square().mean() < 0.02 * images.var()
    small = 0.05 * noise_of(2, 16, 4, 4, seed=1)  # which is not clamped
    torch.testing.assert_close(vae.encode(vae.decode(small).sample).latent_dist.mode(), small, rtol=0, atol=1e-5)


def test_the_index_names_stock_classes_but_for_ours(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == [MODULE, "EmojiPipeline"]
    assert index["vae"] == [CosineVae.home, "CosineVae"]
    assert index["text_encoder"] == ["transformers", "BertModel"]
    assert index["tokenizer"][0] == "transformers"
    assert index["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]
    assert {file.parent.name for file in folder.rglob("*.py")} == {"teacher", "vae"}


def test_stock_diffusers_draws_what_we_draw(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert not type(stock).__module__.startswith("ppcl_ds.")
    ours = open_pipeline(folder, WHOLE)
    options: dict[str, Any] = {"num_inference_steps": 3, "true_cfg_scale": 2.0, "output_type": "pt"}
    drawn = [pipe(CAPTIONS, generator=torch.Generator().manual_seed(5), **options).images for pipe in (stock, ours)]
    assert drawn[0].shape == (3, 3, 32, 32)
    assert torch.equal(*drawn)
    stock.save_pretrained(tmp_path / "again")
    assert {file.relative_to(tmp_path / "again") for file in (tmp_path / "again").rglob("*")} == {
        file.relative_to(folder) for file in folder.rglob("*")
    }


def test_captions_are_berts_hidden_states_without_padding(folder: Path) -> None:
    pipe = open_pipeline(folder, WHOLE)
    embeds, mask = pipe.encode_prompt(CAPTIONS, torch.device("cpu"))
    assert mask is not None
    for caption, row, real in zip(CAPTIONS, embeds, mask, strict=True):
        ids = torch.tensor([pipe.tokenizer(caption).input_ids])
        with torch.no_grad():
            expected = pipe.text_encoder(ids).last_hidden_state[0]
        assert real.sum() == len(expected)
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-5)
        assert not row[len(expected) :].any()


def test_it_is_called_as_any_teacher(folder: Path) -> None:
    call, size = PipelineCall(folder, encodes="all"), Size(32, 32)
    latents = noise_of(1, 16, 8, 8, seed=0)
    assert call.latents_shape(size) == packed(latents).shape
    prompt = call.encode(CAPTIONS[1], size)
    check(call, prompt, size)
    asked = call.arguments(packed(latents), 0, prompt, size)
    assert asked["img_shapes"] == [[(1, 4, 4)]]
    assert asked["encoder_hidden_states"].shape[-1] == WIDTH
    torch.testing.assert_close(call.to_vae(size)(packed(latents)), latents)


def test_a_size_of_no_whole_tokens_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        open_pipeline(folder, WHOLE)("cat on red", height=36)
