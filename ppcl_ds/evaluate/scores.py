"""Scores of images that need no other repository: one table, whose models come from folders that the recipe names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppcl_ds.distances import Array, cmmd, frechet, kernel_distance
from ppcl_ds.errors import UserError, brief, missing
from ppcl_ds.evaluate.perceptual import Perceptual
from ppcl_ds.prompt_sets import Score

_BATCH = 16
"""Images that a score's model reads at a time."""
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Kind = Literal["alone", "to teacher", "set"]
"""What a score is of: an image and its prompt; an image and the teacher's of the same noise; all images and others."""


@dataclass(frozen=True)
class Scorer:
    """One score, ready.

    Attributes:
        more: whether more is better.
        alone: images and their prompts -> a number each.
        to_teacher: images and the teacher's -> a number each.
        of_set: images and reference images -> one number.
        reference: real images, for `of_set`; empty: the teacher's are taken.
    """

    name: str
    kind: Kind
    more: bool = True
    alone: Callable[[Sequence[Path], Sequence[str]], list[float]] | None = None
    to_teacher: Callable[[Sequence[Path], Sequence[Path]], list[float]] | None = None
    of_set: Callable[[Sequence[Path], Sequence[Path]], float] | None = None
    reference: Sequence[Path] = ()


def open_scorer(score: Score, device: torch.device) -> Scorer:
    """Make a score ready.

    Raises:
        UserError: its model, function or reference is not there, or cannot be used.
    """
    name = score.score
    if ":" in name:
        return Scorer(name, "alone", alone=_function(name))
    if name == "psnr":
        return Scorer(name, "to teacher", to_teacher=psnr)
    if score.model is None:
        raise UserError(f"evaluate.scores: '{name}' needs a model; name its place, nothing is downloaded (model: PATH)")
    if name in ("lpips", "dists"):
        return Scorer(name, "to teacher", more=False, to_teacher=Perceptual(name, score.model, device).apart)
    encoder = _Encoder(score.model, device, name)
    if name == "clip":
        return Scorer(name, "alone", alone=encoder.agreement)
    if name == "preference":
        return Scorer(name, "alone", alone=encoder.preference)
    if name == "clip_image":
        return Scorer(name, "to teacher", to_teacher=encoder.likeness)
    distance = {"fid": frechet, "kid": kernel_distance, "cmmd": cmmd}[name]
    reference = _images_in(score.reference) if score.reference else ()

    def of_set(own: Sequence[Path], others: Sequence[Path]) -> float:
        return distance(encoder.features(own), encoder.features(others))

    return Scorer(name, "set", more=False, of_set=of_set, reference=reference)


def psnr(images: Sequence[Path], others: Sequence[Path]) -> list[float]:
    """Peak signal over noise, in dB, at most 100: how near images are to others, pixel by pixel."""
    found = []
    for path, other in zip(images, others, strict=True):
        a, b = (np.asarray(Image.open(each).convert("RGB"), dtype=np.float64) for each in (path, other))
        error = float(((a - b) ** 2).mean())
        found.append(min(100.0, 10 * float(np.log10(255**2 / error))) if error else 100.0)
    return found


class _Encoder:
    """A transformers model that makes features of images, and, if it is a CLIP, of prompts.

    Args:
        folder: as `save_pretrained` wrote it: CLIP, SigLIP, DINOv2, ...

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, folder: Path, device: torch.device, name: str) -> None:
        if not folder.is_dir():
            raise UserError(f"evaluate.scores: the model of '{name}': {missing(folder)}")
        self.folder, self.device, self.name = folder, device, name
        from transformers import AutoImageProcessor, AutoModel  # seconds, which other commands need not wait for

        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval().to(device)
        except Exception as fault:  # whatever a reader of a damaged or foreign folder raises
            raise self._fault(fault) from None
        self.reads_text = hasattr(self.model, "get_text_features")
        if name in ("clip", "cmmd", "preference") and not self.reads_text:
            raise UserError(f"evaluate.scores: '{name}' needs a CLIP, but {folder} is a {type(self.model).__name__}")
        self.kept: dict[tuple[Path, ...], Tensor] = {}

    def _fault(self, fault: Exception) -> UserError:
        return UserError(
            f"evaluate.scores: the model of '{self.name}' in {self.folder} cannot be loaded ({brief(fault)})"
        )

    @torch.no_grad()
    def embedded(self, images: Sequence[Path]) -> Tensor:
        """Features (N, D) float32; of a model without a projection, its pooled output."""
        key = tuple(images)
        if key not in self.kept:
            parts = []
            for paths in _parts(images):
                opened = [Image.open(path).convert("RGB") for path in paths]
                pixels = self.processor(images=opened, return_tensors="pt").pixel_values.to(self.device)
                read = self.model.get_image_features if self.reads_text else self.model
                parts.append(_pooled(read(pixel_values=pixels)).float().cpu())
            self.kept[key] = torch.cat(parts)
        return self.kept[key]

    def features(self, images: Sequence[Path]) -> Array:
        return self.embedded(images).double().numpy()

    def agreement(self, images: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        """CLIP score (arXiv 2104.08718): 100 times the cosine of image and prompt, at least 0."""
        return (100 * self._cosine(images, prompts).clamp(min=0)).tolist()

    def preference(self, images: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        """PickScore (arXiv 2305.01569): the logit of a CLIP that was trained on people's choices."""
        return (float(self.model.logit_scale.exp()) * self._cosine(images, prompts)).tolist()

    @torch.no_grad()
    def _cosine(self, images: Sequence[Path], prompts: Sequence[str]) -> Tensor:
        """Of the features of image and prompt, (N,)."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as fault:
            raise self._fault(fault) from None
        texts = []
        for part in _parts(prompts):
            # CLIP reads 77 tokens: of longer prompts, the beginning.
            most = self.model.config.text_config.max_position_embeddings
            tokens = tokenizer(list(part), padding=True, truncation=True, max_length=most, return_tensors="pt")
            texts.append(_pooled(self.model.get_text_features(**tokens.to(self.device))).float().cpu())
        return torch.cosine_similarity(self.embedded(images), torch.cat(texts))

    def likeness(self, images: Sequence[Path], others: Sequence[Path]) -> list[float]:
        """Cosine of the features of images and of others."""
        return torch.cosine_similarity(self.embedded(images), self.embedded(others)).tolist()


def _pooled(output: Any) -> Tensor:
    """Features, as releases of transformers differ in returning them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]


def _images_in(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if len(found) < 2:
        raise UserError(f"evaluate.scores: reference {folder} holds {len(found)} images; give a folder of real ones")
    return found


def _function(path: str) -> Callable[[Sequence[Path], Sequence[str]], list[float]]:
    """A score that somebody else wrote.

    Raises:
        UserError: there is no such function; later, it gives something else than a number for each image.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as fault:
        raise UserError(f"evaluate.scores: cannot load '{path}' ({brief(fault)}); is its package installed?") from None

    def score(images: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for part, texts in zip(_parts(images), _parts(prompts), strict=True):
            values = function([Image.open(image).convert("RGB") for image in part], list(texts))
            try:
                found += [float(value) for value in values]
            except (TypeError, ValueError) as fault:
                raise UserError(f"evaluate.scores: '{path}' gives no list of numbers ({brief(fault)})") from None
        if len(found) != len(images) or not np.isfinite(found).all():
            raise UserError(f"evaluate.scores: '{path}' gives no finite number for each of {len(images)} images")
        return found

    return score
