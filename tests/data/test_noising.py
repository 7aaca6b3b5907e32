"""Noise levels: the density, the uniform share and the shift are those of the textbooks; draws follow the generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats

from ppcl_ds.data.noising import add_noise, draw_sigmas, sigma_quantiles
from ppcl_ds.sections import Noise

LEVELS = 1000


def draws(noise: Noise, count: int = 200_000, seed: int = 0) -> np.ndarray:
    return draw_sigmas(noise, count, torch.Generator().manual_seed(seed)).numpy()


def distance(samples: np.ndarray, theory: object) -> float:
    """Largest gap between the distribution of the samples and the theory, as Kolmogorov and Smirnov measure it."""
    return float(stats.ks_1samp(samples, theory).statistic)


def test_logit_normal_sigmas_have_the_logit_normal_distribution() -> None:
    sigmas = draws(Noise(density="logit_normal"))
    reference = special.expit(np.random.default_rng(0).normal(size=1_000_000))
    assert sigmas.mean() == pytest.approx(reference.mean(), abs=0.003)
    assert sigmas.std() == pytest.approx(reference.std(), abs=0.003)
    assert distance(sigmas, lambda s: stats.norm.cdf(special.logit(s))) < 0.01


def test_uniform_sigmas_are_uniform() -> None:
    assert distance(draws(Noise(density="uniform")), stats.uniform.cdf) < 0.01


def test_the_uniform_share_is_mixed_in() -> None:
    def mixture(s: np.ndarray) -> np.ndarray:
        return 0.7 * stats.norm.cdf(special.logit(s)) + 0.3 * s

    assert distance(draws(Noise(density="logit_normal", uniform_share=0.3)), mixture) < 0.01


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_the_shift_bends_every_single_sigma_by_the_formula(shift: float) -> None:
    plain = draws(Noise(density="logit_normal", uniform_share=0.5))
    shifted = draws(Noise(density="logit_normal", uniform_share=0.5, shift=shift))
    np.testing.assert_allclose(shifted, shift * plain / (1 + (shift - 1) * plain), rtol=1e-5)


def test_quantiles_are_those_of_what_is_drawn() -> None:
    shares = np.array([0.1, 0.5, 0.9])
    noise = Noise(density="logit_normal", shift=3.0)
    plain = special.expit(stats.norm.ppf(shares))
    np.testing.assert_allclose(sigma_quantiles(noise, shares.tolist()), 3 * plain / (1 + 2 * plain), atol=0.005)


def test_every_sigma_is_one_of_the_schedulers_levels() -> None:
    sigmas = draws(Noise(density="uniform"))
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(np.unique(sigmas), np.arange(1, LEVELS + 1) / LEVELS, rtol=1e-5)


def test_the_same_seed_gives_the_same_draws_and_another_seed_others() -> None:
    noise = Noise(density="logit_normal", uniform_share=0.3)
    assert (draws(noise, 64, seed=3) == draws(noise, 64, seed=3)).all()
    assert (draws(noise, 64, seed=3) != draws(noise, 64, seed=4)).any()


def test_draws_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    draws(Noise(uniform_share=0.3), 64)
    add_noise(torch.zeros(2, 1, 4, 4), torch.ones(2), torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_noise_mixes_in_a_straight_line_along_the_velocity() -> None:
    latents = torch.linspace(-1, 1, 3 * 16).view(3, 1, 4, 4)
    sigmas = torch.tensor([0.0, 0.25, 1.0])
    noisy, velocity = add_noise(latents, sigmas, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noisy[0], latents[0])
    torch.testing.assert_close(noisy - sigmas.view(-1, 1, 1, 1) * velocity, latents)
    torch.testing.assert_close(noisy + (1 - sigmas).view(-1, 1, 1, 1) * velocity, latents + velocity)


def test_the_noise_is_standard_normal_and_follows_the_generator() -> None:
    latents = torch.zeros(64, 4, 16, 16)
    once, again = (add_noise(latents, torch.ones(64), torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(once, again)
    assert distance(once.flatten().numpy(), stats.norm.cdf) < 0.01


def test_low_precision_latents_keep_their_dtype_and_see_the_same_noise() -> None:
    latents, sigmas = torch.zeros(4, 1, 8, 8), torch.full((4,), 0.5)
    full = add_noise(latents, sigmas, torch.Generator().manual_seed(2))
    half = add_noise(latents.bfloat16(), sigmas, torch.Generator().manual_seed(2))
    for wide, narrow in zip(full, half, strict=True):
        assert narrow.dtype == torch.bfloat16
        assert torch.equal(wide.bfloat16(), narrow)
