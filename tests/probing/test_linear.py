"""Probing: streamed sums give the least-squares probes, and matrices are those of all activations at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppcl_ds.data.batch import Prompts
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.call import caller_for
from ppcl_ds.probing.linear import NormalEquations, apply_probe, linear_cka
from ppcl_ds.probing.probe import Prober, Reading
from tests.conftest import TEACHERS

CPU = torch.device("cpu")


def tokens(count: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What enters a block and what leaves it, (N, C) each, float64, with a mean and unequal channels."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.linspace(0.5, 3, channels, dtype=torch.float64)
    before = torch.randn(count, channels, generator=generator, dtype=torch.float64) * size + 2
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return before, before + (before @ mixing).tanh()


def sums_of(before: Tensor, after: Tensor) -> NormalEquations:
    sums = NormalEquations(before.shape[1], CPU)
    sums.add(before, after)
    return sums


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), seed=st.integers(0, 1000))
def test_probes_from_chunks_are_the_least_squares_solution(cuts: list[int], seed: int) -> None:
    before, after = tokens(200, 7, seed)
    sums = NormalEquations(7, CPU)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 200], strict=True):
        sums.add(before[start:stop], after[start:stop])
    x = torch.cat([before, torch.ones(200, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(x, after - before).solution
    torch.testing.assert_close(sums.solve(0.0), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(apply_probe(sums.solve(0.0), before), before + x @ expected, rtol=0, atol=1e-6)


def test_an_affine_block_is_found_exactly() -> None:
    before, _ = tokens(100, 5)
    weight, bias = (t.double() for t in torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).split([5, 1]))
    probe = sums_of(before, before @ weight + bias).solve(0.0)
    torch.testing.assert_close(apply_probe(probe, before), before @ weight + bias, rtol=0, atol=1e-9)


def test_sums_of_many_workers_add_up() -> None:
    before, after = tokens(300, 6)
    whole, parts = sums_of(before, after), [sums_of(before[i::3], after[i::3]) for i in range(3)]
    merged = NormalEquations(6, CPU)
    for part in parts:
        merged.gram += part.gram
        merged.cross += part.cross
    torch.testing.assert_close(merged.gram, whole.gram)
    torch.testing.assert_close(merged.cross, whole.cross)
    torch.testing.assert_close(merged.solve(1e-6), whole.solve(1e-6), rtol=0, atol=1e-9)


def test_low_precision_tokens_are_summed_in_float64() -> None:
    before, after = (t.bfloat16() for t in tokens(500, 6))
    low, high = sums_of(before, after), sums_of(before.double(), after.double())
    assert torch.equal(low.gram, high.gram)
    assert torch.equal(low.cross, high.cross)


@pytest.mark.parametrize("count", [1, 5, 15])
def test_fewer_tokens_than_channels_stay_finite(count: int) -> None:
    before, after = tokens(count, 16)
    probe = sums_of(before, after).solve(1e-6)
    assert probe.isfinite().all()
    error = (apply_probe(probe, before) - after).norm() / (after - before).norm()
    assert error < 0.01  # so few tokens can all be matched


def test_the_ridge_term_does_not_pull_on_the_constant() -> None:
    before, _ = tokens(100, 4)
    probe = sums_of(before, before + 5.0).solve(1.0)
    torch.testing.assert_close(apply_probe(probe, before), before + 5.0, rtol=0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(3, 40), left=st.integers(1, 9), right=st.integers(1, 9))
def test_cka_is_that_of_the_centred_kernels(seed: int, rows: int, left: int, right: int) -> None:
    x, y = tokens(rows, left, seed)[0], tokens(rows, right, seed + 1)[1]
    x, y = x - x.mean(0), y - y.mean(0)
    assert linear_cka(x.T @ x, x.T @ y, y.T @ y) == pytest.approx(kernel_cka(x.numpy(), y.numpy()), abs=1e-9)


def kernel_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al., arXiv 1905.00414, by (N, N) kernels and their Hilbert-Schmidt independence."""
    centring = np.eye(len(x)) - 1 / len(x)
    k, other = centring @ (x @ x.T) @ centring, centring @ (y @ y.T) @ centring
    return float((k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum()))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A world of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


Activations = dict[tuple[int, str], tuple[Tensor, Tensor]]
"""(block, stream) -> tokens entering and leaving it, over all forwards."""


@torch.no_grad()
def read(model: Any, seeds: range) -> tuple[list[Reading], Activations]:
    """What the prober is given, and the same forwards as plain hooks saw them, with padding cut off."""
    masked = "Qwen" in type(model).__name__
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
    caller, anatomy = caller_for(type(model).__name__), Anatomy(model)
    readings: list[Reading] = []
    parts: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        latents, embeds = torch.randn(8, 1, 8, 8, generator=generator), torch.randn(8, 6, 16, generator=generator)
        mask = (torch.arange(6) < torch.randint(1, 7, (8, 1), generator=generator)) if masked else None
        prompts = Prompts(embeds, mask, torch.randn(8, 8, generator=generator))
        seen: list[tuple[dict[str, Any], Any]] = []
        handles = [
            block.register_forward_hook(lambda m, args, kw, out: seen.append((kw, out)), with_kwargs=True)  # noqa: B023
            for block in blocks
        ]
        with anatomy.record(model) as capture:
            caller(model, latents, prompts, torch.rand(8, generator=generator))
        for handle in handles:
            handle.remove()
        readings.append((capture, mask))
        for index, (entered, (text, image)) in enumerate(seen):
            pairs = {"image": (entered["hidden_states"], image), "text": (entered["encoder_hidden_states"], text)}
            for stream, pair in pairs.items():
                keep = mask if stream == "text" and mask is not None else torch.ones(pair[0].shape[:2]).bool()
                parts.setdefault((index, stream), []).append((pair[0][keep].double(), pair[1][keep].double()))
    joined = {key: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])) for key, pairs in parts.items()}
    return readings, joined


def ridge_probe(before: Tensor, after: Tensor, ridge: float) -> Tensor:
    """Ridge regression as an ordinary least-squares problem with one extra row for each channel."""
    channels = before.shape[1]
    penalty = (ridge * before.square().sum(0).mean()).sqrt()
    extra = torch.cat([penalty * torch.eye(channels).double(), torch.zeros(channels, 1).double()], dim=1)
    x = torch.cat([torch.cat([before, torch.ones(len(before), 1).double()], dim=1), extra])
    return torch.linalg.lstsq(x, torch.cat([after - before, torch.zeros(channels, channels).double()])).solution


@pytest.mark.parametrize(("family", "unused"), [("qwen", ["text"]), ("flux", [])])
@pytest.mark.usefixtures("alone")
def test_the_matrices_are_those_of_all_activations_at_once(family: str, unused: list[str]) -> None:
    class_name, config = TEACHERS[family]
    torch.manual_seed(0)
    model = getattr(diffusers, class_name)(**config).eval()
    anatomy = Anatomy(model)
    fitting, fitted = read(model, range(5))
    measuring, measured = read(model, range(5, 8))
    prober = Prober(anatomy, unused, 1e-4, CPU)
    prober.fit(fitting, 5)
    prober.measure(measuring, 3)
    report = prober.report(class_name)

    size = len(anatomy)
    lists = [range(6)] if family == "qwen" else [range(4), range(4, 9)]
    probes = {key: ridge_probe(*pair, 1e-4) for key, pair in fitted.items()}
    for u in range(size):
        for v in range(size):
            cka, error = report.cka[u][v], report.error[u][v]
            if v <= u or not any(u in blocks and v in blocks for blocks in lists):
                assert (cka, error) == (1.0 if u == v else None, None)
                continue
            ckas, errors = [], []
            for stream in [s for s in ("image", "text") if not (v == size - 1 and s in unused)]:
                similar, chain = fitted[u, stream][1], measured[u, stream][1]
                for block in range(u + 1, v + 1):
                    similar = follow(probes[block, stream], similar)
                    chain = follow(probes[block, stream], chain)
                ckas.append(kernel_cka(fitted[u, stream][1].numpy(), similar.numpy()))
                true = measured[v, stream][1]
                errors.append(float((chain - true).square().sum() / true.square().sum()))
            assert cka == pytest.approx(np.mean(ckas), abs=1e-7)
            assert error == pytest.approx(np.mean(errors), rel=1e-6)
    assert report.tokens == {stream: len(fitted[0, stream][0]) for stream in ("image", "text")}
    assert (report.teacher, report.unused) == (class_name, unused)


def follow(probe: Tensor, stream: Tensor) -> Tensor:
    return stream + stream @ probe[:-1] + probe[-1]


@pytest.mark.usefixtures("alone")
def test_a_block_that_is_affine_costs_nothing() -> None:
    class_name, config = TEACHERS["qwen"]
    torch.manual_seed(0)
    model = getattr(diffusers, class_name)(**config).eval()
    for block in model.transformer_blocks[2:5]:
        block.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    prober = Prober(Anatomy(model), ["text"], 1e-9, CPU)
    prober.fit(read(model, range(3))[0], 3)
    prober.measure(read(model, range(3, 5))[0], 2)
    report = prober.report(class_name)
    assert report.error[1][4] == pytest.approx(0, abs=1e-9)
    assert report.cka[1][4] == pytest.approx(1, abs=1e-9)
    assert (report.error[1][5] or 0) > 1e-6
