"""What a probe should find, computed the plain way: activations in memory, least squares, chains run block by block.

Nothing here shares code with `ppcl_ds.probing`. Shapes: N tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppcl_ds.teacher.anatomy import Capture
from tests.anatomies import anatomy_of
from tests.calls import answer, random_arguments

Readings = list[tuple[int, Capture, Tensor | None]]
"""Numbered micro-batches as the program under test reads them, and the masks of their text tokens."""
Activations = dict[tuple[int, str], list[tuple[np.ndarray, np.ndarray]]]
"""(block, stream) -> for each micro-batch the tokens entering and leaving it, (N, C) each."""


@torch.no_grad()
def read(model: Any, numbers: range) -> tuple[Readings, Activations]:
    """Some forwards as the program sees them, and the same as plain hooks see them, with padding cut off."""
    masked = "Qwen" in type(model).__name__
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
    anatomy = anatomy_of(model)
    readings: Readings = []
    activations: Activations = {}
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        lengths = torch.randint(1, 7, (8,), generator=generator).tolist() if masked else [6] * 8
        sigmas = torch.rand(8, generator=generator).tolist()
        arguments = random_arguments(type(model).__name__, number, lengths, sigmas)
        mask = arguments.get("encoder_hidden_states_mask")
        seen: list[tuple[dict[str, Any], Any]] = []
        handles = [
            block.register_forward_hook(lambda m, args, kw, out: seen.append((kw, out)), with_kwargs=True)  # noqa: B023
            for block in blocks
        ]
        with anatomy.record(model) as capture:
            answer(model, arguments)
        for handle in handles:
            handle.remove()
        readings.append((number, capture, mask))
        for index, (entered, (text, image)) in enumerate(seen):
            pairs = {"image": (entered["hidden_states"], image), "text": (entered["encoder_hidden_states"], text)}
            for stream, pair in pairs.items():
                if pair[1] is None:  # SD3's last block returns no text
                    continue
                keep = mask if stream == "text" and mask is not None else torch.ones(pair[0].shape[:2]).bool()
                before, after = (tensor[keep].double().numpy() for tensor in pair)
                activations.setdefault((index, stream), []).append((before, after))
    return readings, activations


def ridge_probe(before: np.ndarray, after: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regression as an ordinary least-squares problem with one extra row for each channel: (C + 1, C)."""
    channels = before.shape[1]
    penalty = np.sqrt(ridge * np.square(before).sum(0).mean())
    extra = np.hstack([penalty * np.eye(channels), np.zeros((channels, 1))])
    x = np.vstack([np.hstack([before, np.ones((len(before), 1))]), extra])
    y = np.vstack([after - before, np.zeros((channels, channels))])
    return torch.linalg.lstsq(torch.from_numpy(x), torch.from_numpy(y), driver="gelsd").solution.numpy()


def follow(probe: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """One step of a chain."""
    return stream + stream @ probe[:-1] + probe[-1]


def kernel_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al., arXiv 1905.00414, by (N, N) kernels and their Hilbert-Schmidt independence."""
    centring = np.eye(len(x)) - 1 / len(x)
    k, other = centring @ (x @ x.T) @ centring, centring @ (y @ y.T) @ centring
    return float((k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum()))


def u_centred_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC_1 by U-centring (Szekely and Rizzo 2014): an inner product of matrices, where Song et al. have a formula."""

    def centre(gram: np.ndarray) -> np.ndarray:
        n = len(gram)
        gram = gram - np.diag(np.diag(gram))
        rows = gram.sum(0) / (n - 2)
        centred = gram - rows[:, None] - rows[None] + gram.sum() / ((n - 1) * (n - 2))
        return centred - np.diag(np.diag(centred))

    return float((centre(x @ x.T) * centre(y @ y.T)).sum() / (len(x) * (len(x) - 3)))


def minibatch_cka(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Nguyen et al., arXiv 2010.15327, eq. 3, over minibatches of the same tokens in two places."""
    xy, xx, yy = (sum(u_centred_hsic(p[a], p[b]) for p in pairs) for a, b in ((0, 1), (0, 0), (1, 1)))
    return float(xy / np.sqrt(xx * yy))


def influence(before: np.ndarray, after: np.ndarray) -> float:
    """Block Influence (ShortGPT, arXiv 2403.03853, eq. 1)."""
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    return float(1 - ((before * after).sum(1) / norms).mean())


def tokens(count: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What enters a block and what leaves it, (N, C) each, float64, with a mean and unequal channels."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.linspace(0.5, 3, channels, dtype=torch.float64)
    before = torch.randn(count, channels, generator=generator, dtype=torch.float64) * size + 2
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return before, before + (before @ mixing).tanh()
