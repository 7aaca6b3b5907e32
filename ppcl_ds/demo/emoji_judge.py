"""The emoji's judge: is the caption found again in the drawn picture, and do drawings spread as real pictures do?

A small network learns from the real pictures which drawing they show and on which ground. A picture is right when both
are what its caption asks for: one of 2,320 pairs.
Shapes: N pictures, D features.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ppcl_ds.atomic import atomic_write
from ppcl_ds.console import track
from ppcl_ds.demo.emoji import GROUNDS, PIXELS, Asked, asked, drawings, folder, samples
from ppcl_ds.demo.testbeds import as_tensor
from ppcl_ds.distances import frechet

_FEATURES = 64
"""D: few enough for the covariance of a few hundred pictures."""
_STEPS, _BATCH, _LR = 600, 128, 3e-3
_SHIFT = 2
"""Pixels by which pictures are moved at random, as what is drawn is never quite a real one."""
_NOISE = 0.3
"""Standard deviation of the noise that is laid over them, at most."""


class Classifier(nn.Module):
    """Pictures (N, 3, 32, 32) in [-1, 1] -> features (N, D), and from them a score for each drawing and each ground."""

    def __init__(self, drawings: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (PIXELS // 8) ** 2, _FEATURES))
        self.drawing, self.ground = nn.Linear(_FEATURES, drawings), nn.Linear(_FEATURES, len(GROUNDS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (N, D), scores of drawings and of grounds."""
        features = self.body(images)
        return features, self.drawing(F.silu(features)), self.ground(F.silu(features))

    @torch.no_grad()
    def sees(self, images: Tensor) -> tuple[Tensor, list[Asked]]:
        """Features (N, D), and what each picture shows."""
        parts = [self(part) for part in images.split(256)]
        features, drawn, grounds = (torch.cat(each) for each in zip(*parts, strict=True))
        pairs = zip(drawn.argmax(1).tolist(), grounds.argmax(1).tolist(), strict=True)
        return features, [Asked(*pair) for pair in pairs]


def train(images: Tensor, meant: Sequence[Asked], steps: int) -> Classifier:
    """A classifier of pictures (N, 3, 32, 32) in [-1, 1], from what they show; the same one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(len(drawings()))
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor(meant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps)
    for _ in track(range(steps), "training the emoji's judge", steps):
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        rows, columns = torch.randint(0, 2 * _SHIFT + 1, (2,), generator=generator).tolist()
        moved = F.pad(images[chosen], [_SHIFT] * 4, mode="replicate")
        moved = moved[..., rows : rows + images.shape[-2], columns : columns + images.shape[-1]]
        amount = _NOISE * torch.rand(_BATCH, 1, 1, 1, generator=generator)
        noisy = moved + amount * torch.randn(moved.shape, generator=generator)
        _, drawn, grounds = model(noisy)
        loss = F.cross_entropy(drawn, targets[chosen, 0]) + F.cross_entropy(grounds, targets[chosen, 1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def shown(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
    """1 for each picture in which the classifier sees what its caption asks for, else 0; for `evaluate.scores`."""
    _, seen = judge().classifier.sees(as_tensor(list(images)))
    return [float(found == asked(caption)) for found, caption in zip(seen, captions, strict=True)]


def score(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Mark drawn emoji. Compare only marks of equally many images, as `judge.score` says of digits.

    Args:
        images: (N, 3, 32, 32) in [-1, 1]; what lies outside is clipped, as an image file would clip it.
        captions: N captions of the testbed.

    Returns:
        `accuracy`: share of images in which the classifier sees both the drawing and the ground of the caption.
        `frechet`: Frechet distance between the features of these and of all real pictures.
    """
    meant = [asked(caption) for caption in captions]
    # A diverged model draws NaN: a bad mark, not a crash.
    features, seen = judge().classifier.sees(torch.nan_to_num(images.detach().float().cpu()).clamp(-1, 1))
    return {
        "accuracy": float(np.mean([found == wanted for found, wanted in zip(seen, meant, strict=True)])),
        "frechet": frechet(features.double().numpy(), judge().real),
    }


@dataclass(frozen=True)
class Judge:
    """What pictures are marked by."""

    classifier: Classifier
    real: NDArray[np.float64]
    """Features of all real pictures, (2320, D)."""


def judge_file(images: Tensor, captions: Sequence[str]) -> Path:
    """Where a classifier is kept that was trained on these."""
    told = hashlib.sha256(images.numpy().tobytes() + "\n".join(captions).encode() + str(_STEPS).encode())
    return folder() / f"judge-{told.hexdigest()[:16]}.pt"


@lru_cache
def judge() -> Judge:
    """Trained once on all real pictures, about a minute, and kept beside the packages."""
    every = samples()
    images, captions = as_tensor([image for _, image, _ in every]), [caption for _, _, caption in every]
    file = judge_file(images, captions)
    classifier = Classifier(len(drawings())).eval()
    if file.exists():
        classifier.load_state_dict(torch.load(file, weights_only=True))
    else:
        classifier = train(images, [asked(caption) for caption in captions], _STEPS)
        content = io.BytesIO()
        torch.save(classifier.state_dict(), content)
        atomic_write(file, content.getvalue())
    return Judge(classifier, classifier.sees(images)[0].double().numpy())
