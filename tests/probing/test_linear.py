"""Probes from streamed sums are the least-squares probes of all activations at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppcl_ds.probing.linear import Moments, fit_probe
from ppcl_ds.probing.sums import BlockSums, Lane
from tests.probing.reference import follow, ridge_probe, tokens

CPU = torch.device("cpu")


def moments_of(before: Tensor, after: Tensor) -> Moments:
    before, after = before.double(), after.double()
    return Moments(before.T @ before, before.T @ after, before.sum(0), after.sum(0), len(before))


def sums_of(chunks: list[tuple[Tensor, Tensor]]) -> BlockSums:
    """The sums at the first of two exits, each chunk a micro-batch of the first half."""
    sums = BlockSums.zero(Lane("image", 0, 2, chunks[0][0].shape[1]), 0, 2, CPU)
    for number, (before, after) in enumerate(chunks):
        sums.add(2 * number, before, [before, after])
    return sums


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), seed=st.integers(0, 1000))
def test_probes_from_chunks_are_the_least_squares_solution(cuts: list[int], seed: int) -> None:
    before, after = tokens(200, 7, seed)
    edges = [0, *sorted(cuts), 200]
    sums = sums_of([(before[a:b], after[a:b]) for a, b in pairwise(edges)])
    assert sums.tokens.tolist() == [200, 0]
    probe = fit_probe(Moments(sums.moments[0, 0], sums.moments[0, 1], sums.totals[0], after.sum(0), 200), 0.0)
    x = torch.cat([before, torch.ones(200, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(x, after - before).solution
    expected[:7] += torch.eye(7)
    torch.testing.assert_close(torch.cat([probe.weight, probe.bias[None]]), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(probe(before), x @ expected, rtol=0, atol=1e-6)


def test_an_affine_block_is_found_exactly() -> None:
    before, _ = tokens(100, 5)
    weight, bias = (t.double() for t in torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).split([5, 1]))
    probe = fit_probe(moments_of(before, before @ weight + bias), 0.0)
    torch.testing.assert_close(probe.weight, weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(probe.bias, bias[0], rtol=0, atol=1e-9)


def test_a_chain_of_maps_is_one_map() -> None:
    before, after = tokens(100, 5)
    one, two = fit_probe(moments_of(before, after), 0.0), fit_probe(moments_of(after, before.sin()), 0.0)
    torch.testing.assert_close(one.then(two)(before), two(one(before)))


def test_low_precision_tokens_are_summed_in_float64() -> None:
    before, after = (t.bfloat16() for t in tokens(500, 6))
    low, high = sums_of([(before, after)]), sums_of([(before.double(), after.double())])
    for name, tensor in low.tensors().items():
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor, high.tensors()[name]), name


@pytest.mark.parametrize("count", [1, 5, 15, 30])
@pytest.mark.parametrize("ridge", [1e-6, 1e-3])
def test_the_ridge_term_makes_few_tokens_a_solvable_problem(count: int, ridge: float) -> None:
    before, after = tokens(count, 16)
    probe = fit_probe(moments_of(before, after), ridge)
    assert probe.weight.isfinite().all()
    expected = follow(ridge_probe(before.numpy(), after.numpy(), ridge), before.numpy())
    torch.testing.assert_close(probe(before), torch.from_numpy(expected), rtol=0, atol=1e-7)
    if count < 16 and ridge == 1e-6:
        assert (probe(before) - after).norm() / (after - before).norm() < 0.01  # so few tokens can all be matched


def test_the_ridge_term_does_not_pull_on_the_constant() -> None:
    before, _ = tokens(100, 4)
    probe = fit_probe(moments_of(before, before + 5.0), 1.0)
    torch.testing.assert_close(probe(before), before + 5.0, rtol=0, atol=1e-9)


def test_large_means_do_not_spoil_the_equations() -> None:
    before, after = tokens(300, 6)
    probe = fit_probe(moments_of(before + 1e5, after + 1e5), 0.0)
    expected = fit_probe(moments_of(before, after), 0.0)
    torch.testing.assert_close(probe.weight, expected.weight, rtol=0, atol=1e-4)
