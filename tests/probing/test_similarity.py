"""CKA against the definitions by kernels, and what tells the biased and the unbiased estimators apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_ds.probing.similarity import Minibatches, linear_cka
from tests.probing.reference import kernel_cka, minibatch_cka, tokens


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(3, 40), left=st.integers(1, 9), right=st.integers(1, 9))
def test_cka_of_covariances_is_that_of_the_centred_kernels(seed: int, rows: int, left: int, right: int) -> None:
    x, y = tokens(rows, left, seed)[0], tokens(rows, right, seed + 1)[1]
    x, y = x - x.mean(0), y - y.mean(0)
    assert linear_cka(x.T @ x, x.T @ y, y.T @ y) == pytest.approx(kernel_cka(x.numpy(), y.numpy()), abs=1e-9)


def batches(counts: list[int], channels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minibatches (K, S, C) in two places, their padding full of rubbish, and their counts."""
    size = max(counts)
    x, y = (t.reshape(len(counts), size, channels) for t in tokens(len(counts) * size, channels, seed))
    x, y = x.clone(), y.clone()
    for row, count in enumerate(counts):
        x[row, count:], y[row, count:] = torch.nan, 1e9
    return x, y, torch.tensor(counts)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), counts=st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_unbiased_cka_is_that_of_u_centred_kernels(seed: int, counts: list[int]) -> None:
    x, y, lengths = batches([*counts, 12], 3, seed)
    pairs = [(a[:n].numpy(), b[:n].numpy()) for a, b, n in zip(x, y, lengths, strict=True) if n >= 4]
    expected = minibatch_cka(pairs)
    found = Minibatches(x, lengths).cka(Minibatches(y, lengths))
    assert np.isnan(found) if np.isnan(expected) else found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_too_few_tokens_have_no_unbiased_cka() -> None:
    x, y, lengths = batches([3, 2, 0], 4, 0)
    assert np.isnan(Minibatches(x, lengths).cka(Minibatches(y, lengths)))


def test_the_unbiased_estimate_does_not_depend_on_the_number_of_tokens_and_the_biased_one_tends_to_it() -> None:
    """Unrelated tokens: the truth is 0. The biased figure shows C / N at few tokens, and next to nothing at many."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 16384, 16, generator=generator, dtype=torch.float64)

    def biased(count: int) -> float:
        a, b = x[:count] - x[:count].mean(0), y[:count] - y[:count].mean(0)
        return linear_cka(a.T @ a, a.T @ b, b.T @ b)

    lengths = torch.full((256,), 64)
    unbiased = Minibatches(x.reshape(256, 64, 16), lengths).cka(Minibatches(y.reshape(256, 64, 16), lengths))
    assert abs(unbiased) < 0.02
    assert biased(64) == pytest.approx(16 / 64, rel=0.25)
    assert biased(16384) < 0.002
