"""Scores at tiny size with random backbones, against what their definitions say; what is missing is one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import transformers
from PIL import Image

from ppcl_ds.distances import Array, cmmd, frechet, kernel_distance
from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.scores import Scorer, open_scorer
from ppcl_ds.prompt_sets import Score
from tests.families.pipelines.words import clip_tokenizer

PROMPTS = ["a tiny red cat", "a blue dog", "two"]
CPU = torch.device("cpu")
SIDE = 8


def wide(length: Any = None) -> dict[str, Any]:
    return {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP for images of 8 x 8, and prompts of eight tokens."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 8
    text = wide() | {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "eos_token_id": tokenizer.eos_token_id}
    vision = wide() | {"image_size": SIDE, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor(folder)
    return folder


def processor(folder: Path) -> None:
    size: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    config = transformers.Dinov2Config(
        image_size=SIDE, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    processor(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return drawn(tmp_path / "own", 0, len(PROMPTS))


def drawn(folder: Path, seed: int, count: int, brightest: int = 255) -> list[Path]:
    folder.mkdir()
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        found.append(folder / f"{number}.png")
        Image.fromarray(random.integers(0, brightest, (SIDE, SIDE, 3), dtype=np.uint8)).save(found[-1])
    return found


def scorer(name: str, folder: Path | None = None, **more: Any) -> Scorer:
    return open_scorer(Score(score=name, model=folder, **more), CPU)


def embedded(folder: Path, images: Sequence[Path]) -> torch.Tensor:
    """CLIP's projected features, by its own processor and its own parts."""
    model: Any = transformers.CLIPModel.from_pretrained(folder)
    read: Any = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = read(images=[Image.open(path) for path in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def test_the_clip_score_is_the_cosine_of_image_and_prompt(clip: Path, images: list[Path]) -> None:
    found = scorer("clip", clip)
    assert found.alone
    model: Any = transformers.CLIPModel.from_pretrained(clip)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(clip)
    seen = embedded(clip, images)
    for number, prompt in enumerate(PROMPTS):  # one by one, so without padding
        with torch.no_grad():
            text = model.text_model(**tokenizer(prompt, return_tensors="pt")).pooler_output
        cosine = torch.cosine_similarity(seen[number], model.text_projection(text)[0], dim=0)
        expected = max(0.0, 100 * float(cosine))
        assert found.alone(images, PROMPTS)[number] == pytest.approx(expected, abs=1e-3)
    assert len(found.alone(images, ["a cat " * 500] * len(images))) == len(images)


def test_preference_is_the_logit_of_a_clip(clip: Path, images: list[Path]) -> None:
    found = scorer("preference", clip)
    assert found.alone
    model: Any = transformers.CLIPModel.from_pretrained(clip)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(clip)
    read: Any = transformers.AutoImageProcessor.from_pretrained(clip)
    for number, (path, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        inputs = dict(tokenizer(prompt, return_tensors="pt")) | dict(
            read(images=[Image.open(path)], return_tensors="pt")
        )
        with torch.no_grad():
            expected = float(model(**inputs).logits_per_image)
        assert found.alone(images, PROMPTS)[number] == pytest.approx(expected, abs=1e-3)


def test_likeness_to_the_teacher(clip: Path, images: list[Path], tmp_path: Path) -> None:
    others = drawn(tmp_path / "teacher", 1, len(images))
    found = scorer("clip_image", clip)
    assert found.to_teacher
    expected = torch.cosine_similarity(embedded(clip, images), embedded(clip, others))
    assert found.to_teacher(images, others) == pytest.approx(expected.tolist(), abs=1e-5)
    assert found.to_teacher(images, images) == pytest.approx([1.0] * len(images))
    near = scorer("psnr").to_teacher
    assert near
    a, b = (np.asarray(Image.open(path), dtype=float) for path in (images[0], others[0]))
    assert near(images, others)[0] == pytest.approx(20 * np.log10(255) - 10 * np.log10(np.mean((a - b) ** 2)))
    assert near(images, images) == [100.0] * len(images)


def test_distances_are_what_their_papers_say() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(0, 1, (50, 6)), random.normal(0.3, 1.4, (40, 6))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    shift = a.mean(0) - b.mean(0)
    assert frechet(a, b) == pytest.approx(shift @ shift + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))

    def mean(kernel: Any, x: Array, y: Array, same: bool) -> float:
        values = [kernel(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if not (same and i == j)]
        return float(np.mean(values))

    def cubic(p: Array, q: Array) -> float:
        return float((p @ q / 6 + 1) ** 3)

    expected = mean(cubic, a, a, True) + mean(cubic, b, b, True) - 2 * mean(cubic, a, b, False)
    assert kernel_distance(a, b) == pytest.approx(expected)

    def gaussian(p: Array, q: Array) -> float:
        p, q = p / np.linalg.norm(p), q / np.linalg.norm(q)
        return float(np.exp(-np.sum((p - q) ** 2) / (2 * 10**2)))

    parts = (mean(gaussian, x, y, False) for x, y in ((a, a), (b, b), (a, b)))
    own, other, between = parts
    assert cmmd(a, b) == pytest.approx(1000 * (own + other - 2 * between))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["fid", "kid", "cmmd"])
def test_sets_of_images_are_compared(name: str, clip: Path, dino: Path, tmp_path: Path) -> None:
    own, others = drawn(tmp_path / "own", 0, 20), drawn(tmp_path / "others", 1, 24, 80)
    for folder in (clip,) if name == "cmmd" else (clip, dino):
        found = scorer(name, folder, reference=tmp_path / "others")
        assert list(found.reference) == sorted(others)
        assert found.of_set
        assert abs(found.of_set(own, own)) < max(1e-6, abs(found.of_set(own, others)))


def bright(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    assert len(images) == len(prompts)
    return [float(np.asarray(image).mean()) for image in images]


def broken(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float("nan")] * len(images)


def test_somebody_elses_score(images: list[Path]) -> None:
    found = scorer(f"{__name__}:bright")
    assert found.alone
    assert found.alone(images, PROMPTS) == [float(np.asarray(Image.open(path)).mean()) for path in images]
    wrong = scorer(f"{__name__}:broken").alone
    assert wrong
    with pytest.raises(UserError, match="no finite number for each of 3 images"):
        wrong(images, PROMPTS)


def test_what_is_missing_is_one_line(clip: Path, dino: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, folder, more, words in (
        ("clip", None, {}, "'clip' needs a model"),
        ("clip", tmp_path / "nowhere", {}, "no such file or folder"),
        ("clip", tmp_path / "empty", {}, "cannot be loaded"),
        ("clip", dino, {}, "'clip' needs a CLIP, but .* is a Dinov2Model"),
        ("cmmd", dino, {}, "'cmmd' needs a CLIP"),
        ("preference", dino, {}, "'preference' needs a CLIP"),
        ("fid", clip, {"reference": tmp_path / "empty"}, "holds 0 images"),
        ("no.such.package:score", None, {}, "cannot load 'no.such.package:score' .*is its package installed"),
        (f"{__name__}:nothing", None, {}, "cannot load"),
    ):
        with pytest.raises(UserError, match=words) as fault:
            scorer(name, folder, **more)
        assert "\n" not in str(fault.value)
    with pytest.raises(ValueError, match="'clap' is not known; known: psnr, lpips, dists, clip"):
        Score(score="clap")
