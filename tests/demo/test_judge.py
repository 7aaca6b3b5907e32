"""The demo's judge: right about real digits, hard on noise, and its Frechet distance is the textbook one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from sklearn.model_selection import StratifiedKFold, cross_val_score

from ppcl_ds.demo.digits import WORDS, real_digits
from ppcl_ds.demo.judge import digit_classifier, score, shown
from ppcl_ds.distances import frechet_distance

Moments = tuple[np.ndarray, np.ndarray]


def real() -> tuple[torch.Tensor, list[str]]:
    pictures, labels = real_digits()
    return torch.tensor(pictures).view(-1, 1, 8, 8), [f"a handwritten {WORDS[label]}" for label in labels]


def random_moments(seed: int, dims: int = 6) -> Moments:
    draws = np.random.default_rng(seed)
    mixing = draws.normal(size=(dims, dims))
    return draws.normal(size=dims), mixing @ mixing.T


def test_the_classifier_is_right_on_97_percent_of_held_out_digits() -> None:
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    assert cross_val_score(digit_classifier(), *real_digits(), cv=folds).mean() >= 0.97


def test_the_real_digits_get_full_marks() -> None:
    marks = score(*real())
    assert marks["accuracy"] > 0.99
    assert marks["frechet"] == pytest.approx(0.0, abs=1e-6)


def test_every_real_digit_is_marked_by_itself() -> None:
    pictures, captions = real()
    images = [Image.fromarray(((each[0].numpy() + 1) * 127.5).round().astype(np.uint8)) for each in pictures[:200]]
    images = [image.convert("RGB") for image in images]  # as prompt sets are kept
    marks = shown(images, captions[:200])
    assert len(marks) == 200
    assert np.mean(marks) > 0.99
    assert np.mean(shown(images, captions[1:201])) < 0.3


def test_fewer_real_digits_are_still_close() -> None:
    images, captions = real()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:500].tolist()
    assert score(images[chosen], [captions[i] for i in chosen])["frechet"] < 0.2


def test_noise_gets_bad_marks() -> None:
    _, captions = real()
    noise = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    marks = score(noise, captions[:500])
    assert marks["accuracy"] < 0.25
    assert marks["frechet"] > 5


def test_right_digits_under_wrong_prompts_lose_accuracy_only() -> None:
    images, captions = real()
    marks = score(images, captions[1:] + captions[:1])
    assert marks["accuracy"] < 0.25
    assert marks["frechet"] == pytest.approx(0.0, abs=1e-6)


def test_one_digit_drawn_again_and_again_is_right_but_far_from_real() -> None:
    images, captions = real()
    marks = score(images[:1].expand(100, -1, -1, -1), captions[:1] * 100)
    assert marks["accuracy"] == 1.0
    assert marks["frechet"] > 5


def test_a_diverged_model_gets_bad_marks_instead_of_an_error() -> None:
    images, captions = real()
    marks = score(torch.full_like(images, float("nan")), captions)
    assert marks["accuracy"] < 0.25
    assert marks["frechet"] > 5


def test_frechet_equals_the_closed_form_for_diagonal_covariances() -> None:
    mean_a, mean_b = np.array([0.0, 1.0, 2.0]), np.array([1.0, -1.0, 2.0])
    spread_a, spread_b = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    expected = ((mean_a - mean_b) ** 2 + (spread_a - spread_b) ** 2).sum()
    assert frechet_distance(mean_a, np.diag(spread_a**2), mean_b, np.diag(spread_b**2)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_frechet_equals_the_matrix_root_formula_and_is_symmetric(seed: int) -> None:
    (mean_a, cov_a), (mean_b, cov_b) = random_moments(seed), random_moments(seed + 100)
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(mean_b, cov_b, mean_a, cov_a) == pytest.approx(expected, rel=1e-6)
