"""The emoji's judge: right about real pictures that it has not seen, hard on noise; its figures are those by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor

from ppcl_ds.demo import emoji_judge
from ppcl_ds.demo.emoji import asked
from ppcl_ds.demo.emoji_judge import judge, score, shown, train
from ppcl_ds.demo.testbeds import TESTBEDS, read_samples

pytestmark = pytest.mark.usefixtures("packages")


@pytest.fixture(scope="module")
def real(packages: Path) -> Iterator[tuple[Tensor, list[str]]]:
    """All pictures and captions, of which there are few: the judge learns them in a shorter time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_judge, "_STEPS", 60)
        patch.setattr(emoji_judge, "_BATCH", 32)
        judge.cache_clear()
        yield read_samples(TESTBEDS["emoji"])
    judge.cache_clear()


def test_pairs_of_drawing_and_ground_that_it_never_saw_are_found(real: tuple[Tensor, list[str]]) -> None:
    images, captions = real
    meant = [asked(caption) for caption in captions]
    # Every drawing and every ground is seen, but not these drawings on these grounds.
    unseen = [(each.drawing + each.ground) % 5 == 0 for each in meant]
    seen = [place for place, new in enumerate(unseen) if not new]
    new = [place for place, new in enumerate(unseen) if new]
    model = train(images[seen], [meant[place] for place in seen], steps=60)
    _, found = model.sees(images[new])
    assert np.mean([a == meant[b] for a, b in zip(found, new, strict=True)]) >= 0.75


def test_figures_are_those_by_hand(real: tuple[Tensor, list[str]]) -> None:
    images, captions = real
    drawn = images[:24] + 0.3 * torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = judge().classifier
    with torch.no_grad():
        features, drawings, grounds = model(drawn.clamp(-1, 1))
        every = model(images)[0].double().numpy()
    right = [
        (int(one.argmax()), int(other.argmax())) == tuple(asked(caption))
        for one, other, caption in zip(drawings, grounds, captions, strict=False)
    ]
    means = [points.mean(axis=0) for points in (features.double().numpy(), every)]
    covariances = [np.cov(points.T) for points in (features.double().numpy(), every)]
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    marks = score(drawn, captions[:24])
    assert marks["accuracy"] == pytest.approx(np.mean(right))
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert marks["frechet"] == pytest.approx(expected, rel=1e-3)


def test_real_pictures_get_full_marks_and_wrong_captions_none(real: tuple[Tensor, list[str]]) -> None:
    images, captions = real
    assert score(images, captions)["accuracy"] == 1
    assert score(images, captions)["frechet"] == pytest.approx(0, abs=1e-4)
    assert score(images, captions[1:] + captions[:1])["accuracy"] == 0  # the next one has another ground
    pictures = [Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).byte().numpy()) for image in images]
    assert shown(pictures, captions) == [1.0] * 40


def test_noise_and_a_diverged_model_get_bad_marks(real: tuple[Tensor, list[str]]) -> None:
    images, captions = real
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for bad in (noise, torch.full_like(images, float("nan"))):
        marks = score(bad, captions)
        assert marks["accuracy"] < 0.2
        assert marks["frechet"] > 1


def test_it_is_trained_once_and_kept(real: tuple[Tensor, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    before = judge()
    monkeypatch.setattr(emoji_judge, "train", lambda *args: pytest.fail("trained again"))
    judge.cache_clear()
    assert np.array_equal(judge().real, before.real)
