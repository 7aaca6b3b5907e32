"""The demo's judge: do the drawn digits show what the prompt asked for, and do they spread as real digits do?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor

from ppcl_ds.demo.digits import digit_in, real_digits
from ppcl_ds.distances import frechet_distance

Array = NDArray[np.float64]

_COMPONENTS = 20
"""Principal components of the real digits in which the Frechet distance is taken: 89 % of their variance."""


def shown(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
    """1 for each drawn digit in which the classifier sees the digit of its prompt, else 0; for `evaluate.scores`."""
    greys = np.stack([np.asarray(image.convert("L"), dtype=float).reshape(-1) / 127.5 - 1 for image in images])
    asked = np.array([digit_in(caption) for caption in captions])
    return (_judge().classifier.predict(greys) == asked).astype(float).tolist()


def score(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Mark drawn digits.

    A footgun: the Frechet distance of any finite sample is above 0, the more so the fewer images there are. 64 of the
    real digits score 1.3, 500 of them 0.11, all of them 0. Compare only marks of equally many images.

    Args:
        images: (N, 1, 8, 8) in [-1, 1]; what lies outside is clipped, as an image file would clip it.
        captions: N prompts, each naming one digit.

    Returns:
        `accuracy`: share of images in which the classifier sees the digit of the prompt.
        `frechet`: Frechet distance between drawn and real digits, in the space of the real ones' principal components.
    """
    judge = _judge()
    # A diverged model draws NaN: a bad mark, not a crash.
    greys = torch.nan_to_num(images.detach().double().cpu()).clamp(-1.0, 1.0).flatten(1).numpy()
    asked = [digit_in(caption) for caption in captions]
    drawn = judge.components.transform(greys)
    return {
        "accuracy": float(np.mean(judge.classifier.predict(greys) == asked)),
        "frechet": frechet_distance(*_moments(drawn), *judge.real),
    }


def digit_classifier() -> SVC:
    """A support vector machine for digits (N, 64) in [-1, 1], not fitted yet; right about 98 % of held-out ones."""
    # The well-known values for these digits, C 10 and gamma 0.001 on greys 0..16: our pixels are 8 times smaller.
    return SVC(C=10.0, gamma=0.001 * 8**2)


@dataclass(frozen=True)
class _Judge:
    classifier: SVC
    components: PCA
    real: tuple[Array, Array]


@lru_cache
def _judge() -> _Judge:
    """Fitted once in a process, on all real digits."""
    images, labels = real_digits()
    components = PCA(_COMPONENTS, svd_solver="full").fit(images)
    real = _moments(components.transform(images))
    return _Judge(digit_classifier().fit(images, labels), components, real)


def _moments(points: Array) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D) of points (N, D)."""
    return points.mean(axis=0), np.cov(points, rowvar=False, bias=True)
