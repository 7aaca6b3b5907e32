"""Differences from the teacher, prompt by prompt: intervals that cover what they should, and honest verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from ppcl_ds.evaluate.paired import interval, paired


def test_an_interval_is_near_the_normal_one_where_that_holds() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = interval(list(values))
    spread = 1.96 * values.std(ddof=1) / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - spread, abs=0.25 * spread)
    assert found.high == pytest.approx(values.mean() + spread, abs=0.25 * spread)
    assert interval(list(values)) == found


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    found = [interval(list(random.exponential(1.0, 40))) for _ in range(100)]
    assert 85 <= sum(each.low <= 1.0 <= each.high for each in found) <= 100


def test_verdicts() -> None:
    random = np.random.default_rng(3)
    teacher = list(random.normal(30.0, 5.0, 200))  # prompts differ far more than models do
    near = [value + noise for value, noise in zip(teacher, random.normal(-0.1, 0.5, 200), strict=True)]
    worse = [value - 2.0 + noise for value, noise in zip(teacher, random.normal(0, 0.5, 200), strict=True)]
    assert paired(teacher, near).verdict == "no worse"
    assert paired(teacher, near).margin == pytest.approx(0.02 * np.mean(teacher))
    assert paired(teacher, worse).verdict == "worse"
    assert paired(teacher, worse, margin=2.5).verdict == "no worse"
    assert paired(teacher, worse, margin=2.0).verdict == "undecided"
    assert paired(teacher, near, margin=0.1).verdict == "undecided"
    assert paired(teacher[:4], near[:4], margin=0.01).verdict == "undecided"


def test_what_cannot_be_resampled_is_not_decided_or_certain() -> None:
    assert paired([1.0], [1.0]).verdict == "undecided"
    same = paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.low, same.high, same.verdict) == (0.0, 0.0, 0.0, "no worse")
    assert paired([1.0, 0.0], [0.0, 0.0], margin=0.1).verdict == "undecided"
