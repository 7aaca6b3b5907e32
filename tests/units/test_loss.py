"""The loss: the textbook formula per token, blind to padding, zero only for the teacher's own output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppcl_ds.units.loss import boundary_loss, branch_loss, norm_ratio
from tests.reference import change_missed

MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, True, True]])


def streams(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's tokens, (3, 4, 8) each, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(3, 4, 1, generator=generator) * 10 + 0.1
    student = torch.randn(3, 4, 8, generator=generator) * size
    return student.to(dtype), torch.randn(3, 4, 8, generator=generator).to(dtype)


def by_hand(student: Tensor, teacher: Tensor, mask: Tensor | None, weight: float) -> float:
    """The formula in float64 numpy, token by token."""
    s, t = student.double().numpy().reshape(-1, 8), teacher.double().numpy().reshape(-1, 8)
    counts = np.ones(len(s), dtype=bool) if mask is None else mask.numpy().reshape(-1)
    total = []
    for a, b in zip(s[counts], t[counts], strict=True):
        length_a, length_b = np.sqrt(np.sum(a**2)), np.sqrt(np.sum(b**2))
        total.append(np.sum((a / length_a - b / length_b) ** 2) + weight * np.log(length_a / length_b) ** 2)
    return float(np.mean(total))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all tokens", "masked"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3])
def test_the_loss_is_the_formula(mask: Tensor | None, weight: float) -> None:
    student, teacher = streams()
    assert boundary_loss(student, teacher, mask, weight).item() == pytest.approx(
        by_hand(student, teacher, mask, weight), rel=1e-5
    )


@pytest.mark.parametrize("mask", [None, MASK], ids=["all tokens", "masked"])
def test_the_norm_ratio_is_the_mean_of_the_quotients(mask: Tensor | None) -> None:
    student, teacher = streams()
    quotients = np.linalg.norm(student.numpy(), axis=-1) / np.linalg.norm(teacher.numpy(), axis=-1)
    counts = np.ones((3, 4), dtype=bool) if mask is None else mask.numpy()
    assert norm_ratio(student, teacher, mask).item() == pytest.approx(quotients[counts].mean(), rel=1e-5)
    assert norm_ratio(teacher * 3, teacher, mask).item() == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("garbage", [0.0, -7.0, 1e30, float("nan")])
def test_padding_changes_neither_the_loss_nor_the_gradients(garbage: float) -> None:
    student, teacher = streams()
    results = []
    for filling in (1.0, garbage):
        mine = student.masked_fill(~MASK[..., None], filling).requires_grad_()
        loss = boundary_loss(mine, teacher.masked_fill(~MASK[..., None], filling * 2), MASK, 1.0)
        loss.backward()
        results.append((loss.detach(), mine.grad))
    (plain, gradient), (loss, other) = results
    assert gradient is not None
    assert other is not None
    assert torch.equal(plain, loss)
    assert torch.equal(gradient[MASK], other[MASK])
    assert not other[~MASK].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 11), st.floats(0.01, 10))
def test_the_loss_is_zero_only_for_the_teachers_own_output(seed: int, token: int, size: float) -> None:
    _, teacher = streams(seed)
    assert boundary_loss(teacher.clone(), teacher, None, 1.0).item() == 0
    turned, stretched = teacher.clone().view(12, 8), teacher.clone().view(12, 8)
    turned[token] = turned[token].roll(1)
    stretched[token] *= 1 + size
    assert boundary_loss(turned.view(3, 4, 8), teacher, None, 1.0).item() > 0
    assert boundary_loss(stretched.view(3, 4, 8), teacher, None, 1.0).item() > 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 20), st.floats(0, 3))
def test_scaling_changes_only_the_magnitude_term(seed: int, scale: float, weight: float) -> None:
    student, teacher = streams(seed)
    direction = boundary_loss(student, teacher, MASK, 0.0).item()
    assert boundary_loss(student * scale, teacher, MASK, 0.0).item() == pytest.approx(direction, rel=1e-4)
    magnitude = weight * np.log(scale) ** 2
    assert boundary_loss(teacher * scale, teacher, MASK, weight).item() == pytest.approx(magnitude, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all tokens", "masked"])
@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_zero_tokens_keep_loss_and_gradients_finite(zero: str, mask: Tensor | None) -> None:
    student, teacher = streams()
    if zero != "teacher":
        student[0, 0] = student[2, 3] = 0
    if zero != "student":
        teacher[0, 0] = teacher[1, 0] = 0
    student.requires_grad_()
    loss = boundary_loss(student, teacher, mask, 1.0)
    loss.backward()
    assert student.grad is not None
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert norm_ratio(student.detach(), teacher, mask).isfinite()


def test_low_precision_tokens_are_compared_in_float32() -> None:
    student, teacher = streams(dtype=torch.bfloat16)
    loss = boundary_loss(student, teacher, MASK, 1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == boundary_loss(student.float(), teacher.float(), MASK, 1.0).item()
    assert loss.item() == pytest.approx(by_hand(student, teacher, MASK, 1.0), rel=1e-5)
    assert norm_ratio(student, teacher, MASK).dtype == torch.float32


def test_gradients_are_those_of_finite_differences() -> None:
    student, teacher = streams()
    student.requires_grad_()
    boundary_loss(student, teacher, MASK, 0.7).backward()
    assert student.grad is not None
    direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(5))
    step, start = 1e-5, student.detach().double()
    ahead, after = (by_hand(start + sign * step * direction, teacher, MASK, 0.7) for sign in (1, -1))
    assert float((student.grad * direction).sum()) == pytest.approx((ahead - after) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all tokens", "masked"])
def test_weights_multiply_what_each_sample_adds(mask: Tensor | None) -> None:
    """The reference: each sample by itself by the formula, times its tokens that count."""
    student, teacher = streams()
    weights = torch.tensor([2.0, 0.0, 0.5])
    counts = [4, 4, 4] if mask is None else mask.sum(1).tolist()
    each = [by_hand(student[i], teacher[i], None if mask is None else mask[i], 0.3) for i in range(3)]
    expected = sum(w * n * loss for w, n, loss in zip(weights.tolist(), counts, each, strict=True)) / sum(counts)
    assert boundary_loss(student, teacher, mask, 0.3, weights).item() == pytest.approx(expected, rel=1e-5)
    if mask is None:  # a part that is given the tokens of all samples in one row
        rows = student.reshape(1, 12, 8), teacher.reshape(1, 12, 8)
        assert boundary_loss(rows[0], rows[1], None, 0.3, weights).item() == pytest.approx(expected, rel=1e-5)


def test_the_branch_loss_is_what_is_missed_of_what_the_prompt_changes() -> None:
    student, teacher = streams()
    for each in ([0, 1, 2], [0, 0, 2], [0, 0, 0]):
        places = torch.tensor(each)
        expected = float(change_missed(student, teacher, places))
        assert branch_loss(student, teacher, places).item() == pytest.approx(expected, rel=1e-5)
        assert (expected == 0) == (each == [0, 1, 2])
    twins = torch.tensor([0, 0, 2])
    assert branch_loss(teacher + 3, teacher, twins).item() == pytest.approx(0, abs=1e-9), (
        "what both have does not count"
    )
    deaf = teacher.clone()
    deaf[1] = deaf[0]
    assert branch_loss(deaf, teacher, twins).item() == pytest.approx(1)
