"""Teacher and variant compared prompt by prompt: the mean difference, how sure it is, and what that says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from scipy.stats import bootstrap

CONFIDENCE = 0.95
_RESAMPLES = 2000
_CORRECTED = 1000
"""Up to so many prompts intervals are corrected for bias and skew (BCa); beyond, that takes long and changes little."""
_SHARE = 0.02
"""Of the teacher's mean: the margin where the recipe names none."""

Verdict = Literal["no worse", "worse", "undecided"]


class Interval(BaseModel):
    """A mean over prompts with its bootstrap confidence interval."""

    mean: float
    low: float
    high: float


class Paired(Interval):
    """The mean of variant minus teacher over prompts, more being better.

    Attributes:
        margin: what counts as a loss.
        verdict: `no worse`: the whole interval lies above minus the margin. `worse`: all of it lies below.
    """

    margin: float
    verdict: Verdict


def interval(values: Sequence[float]) -> Interval:
    """The mean of values, one a prompt, and where 95 % of its bootstrap resamples lie.

    BCa after Efron 1987, by scipy; from a generator of its own, so that the same values give the same interval.
    """
    given: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    mean = float(given.mean())
    if len(given) < 2 or np.ptp(given) == 0:  # nothing to resample
        return Interval(mean=mean, low=mean, high=mean)
    found = bootstrap(
        (given,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=100,
        confidence_level=CONFIDENCE,
        method="BCa" if len(given) <= _CORRECTED else "percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean=mean, low=float(found.low), high=float(found.high))


def paired(teacher: Sequence[float], variant: Sequence[float], margin: float | None = None) -> Paired:
    """A variant against the teacher, from a score of each prompt; more is better.

    Args:
        margin: so much may be lost; None: 2 % of the teacher's mean.
    """
    if margin is None:
        margin = _SHARE * abs(float(np.mean(teacher)))
    found = interval([own - its for own, its in zip(variant, teacher, strict=True)])
    verdict: Verdict = "undecided"
    if len(teacher) > 1 and found.low > -margin:
        verdict = "no worse"
    elif len(teacher) > 1 and found.high < -margin:
        verdict = "worse"
    return Paired(**found.model_dump(), margin=margin, verdict=verdict)
