"""What one model is worth: size, speed, and how far its velocities and images are from the teacher's.

Shapes: N images, C channels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.benchmark import Timer

from ppcl_ds.errors import UserError
from ppcl_ds.export.load import load_model
from ppcl_ds.export.placing import place
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.drawing import Drawing
from ppcl_ds.teacher.heldout import HeldOut, mean_squared
from ppcl_ds.teacher.noising import DTYPES, NoisyStream
from ppcl_ds.teacher.pipeline_call import Arguments
from ppcl_ds.teacher.teacher import Teacher, forward

_FIFTHS = 5
"""Groups of held-out samples by noise."""

Judge = Callable[[Tensor, Sequence[str]], dict[str, float]]
"""Scores images (N, C, H, W) in [-1, 1] against their captions."""


class ModelFigures(BaseModel):
    """One row of the report.

    Attributes:
        name: `teacher`, a variant, or a variant with `-undistilled`.
        params: parameters of the whole transformer.
        block_params_ratio: parameters in its blocks over those in the teacher's.
        latency_ms: milliseconds of one forward of one sample, the median over a second.
        accuracy: share of images that show what was asked; None where the recipe names no judge.
        frechet: Frechet distance of the images to real ones; None likewise.
        images: that both are of; 0: not known, of an earlier release.
        velocity_mse: mean squared difference from the teacher's velocity on held-out data.
        sample_mse: mean squared difference from the teacher's latents drawn from the same noise.
        by_noise: mean place on the ladder of noise (0 is pure noise) and the same difference there, for fifths of the
            held-out samples.
        weights: which files were measured (`weights_digest` of the variant's folder); None for other models.
    """

    name: str
    params: int
    block_params_ratio: float
    latency_ms: float
    accuracy: float | None = None
    frechet: float | None = None
    images: int = 0
    velocity_mse: float
    sample_mse: float
    by_noise: Sequence[tuple[float, float]] = ()
    weights: str | None = None


class Bench:
    """The same held-out data, prompts and noise for every model.

    The first model measured must be the teacher; the others are compared with it.

    Args:
        fits: whether the pipeline's other transformers fit on the device, see `placed`.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, device: torch.device, fits: bool = True) -> None:
        self.recipe, self.teacher, self.device = recipe, teacher, device
        self.dtype = DTYPES[recipe.teacher.precision]
        settings = recipe.evaluate
        self.heldout = HeldOut(recipe, teacher, device)
        stored = NoisyStream(recipe, teacher.call, "heldout", 1, captions=True)
        samples = [batch.samples[0] for _, batch in islice(stored.clean.take(0, 1), settings.samples)]
        self.captions = [sample.caption for sample in samples]
        self.drawings = Drawing.several(recipe, teacher.call, stored.noiser, samples, settings.batch_size)
        self.others = {
            name: place(load_model(teacher.path / name, self.dtype), device, fits)
            for name in teacher.call.transformers()
            if name != teacher.component
        }
        self.judge = load_judge(settings.judge) if settings.judge else None
        self.teacher_velocities: list[Tensor] = []
        self.teacher_latents: list[Tensor] = []
        self.teacher_blocks = 0

    def measure(self, name: str, model: nn.Module, decode: Callable[..., Tensor]) -> tuple[ModelFigures, Tensor]:
        """All figures of one model, and its images (N, C, height, width) in [-1, 1].

        Args:
            model: already in the recipe's dtype; it can be run on the device.
        """
        velocities = self.heldout.velocities(model)
        latents, images = self._draw(model, decode)
        blocks = Anatomy(model, self.teacher.flows).block_parameters
        if not self.teacher_latents:
            self.teacher_velocities, self.teacher_latents, self.teacher_blocks = velocities, latents, blocks
        scores = self.judge(images, self.captions) if self.judge else {}
        figures = ModelFigures(
            name=name,
            params=sum(p.numel() for p in model.parameters()),
            block_params_ratio=blocks / self.teacher_blocks,
            latency_ms=self.latency(model),
            accuracy=scores.get("accuracy"),
            frechet=scores.get("frechet"),
            images=len(images),
            velocity_mse=mean_squared(velocities, self.teacher_velocities),
            by_noise=self._by_noise(velocities),
            sample_mse=mean_squared(latents, self.teacher_latents),
        )
        return figures, images

    def _by_noise(self, velocities: Sequence[Tensor]) -> list[tuple[float, float]]:
        """Fifths of the held-out samples, the noisiest first: their mean place, and the mean squared difference."""
        pairs = zip(velocities, self.teacher_velocities, strict=True)
        errors = torch.cat([(one - other).square().flatten(1).mean(1) for one, other in pairs])
        places = torch.cat([batch.places for batch in self.heldout.batches])
        parts = places.argsort().tensor_split(_FIFTHS)
        return [(float(places[part].mean()), float(errors[part].mean())) for part in parts if len(part)]

    def _draw(self, model: nn.Module, decode: Callable[..., Tensor]) -> tuple[list[Tensor], Tensor]:
        """Latents, a batch at a time, and all images."""
        models = self.others | {self.teacher.component: model}
        answers = {name: partial(self._answer, each) for name, each in models.items()}
        drawn = [drawing.draw(answers, decode) for drawing in self.drawings]
        return [latents for latents, _ in drawn], torch.cat([images for _, images in drawn if images is not None])

    def _answer(self, model: nn.Module, arguments: Arguments) -> Tensor:
        """What a model puts out for arguments on the CPU."""
        return forward(model, self._moved(arguments)).cpu()

    def _moved(self, arguments: Arguments) -> Arguments:
        return pytree.tree_map_only(Tensor, lambda t: t.to(self.device), arguments)

    def latency(self, model: nn.Module) -> float:
        """Milliseconds of one forward of one sample, the median over a second."""
        arguments = self._moved(self.teacher.example(self.drawings[0].size))

        @torch.no_grad()
        def run() -> None:
            forward(model, arguments).cpu()  # which waits for the device

        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        return 1000 * timer.blocked_autorange(min_run_time=1.0).median


def load_judge(path: str) -> Judge:
    """The function that `evaluate.judge` names as `module:function`.

    Raises:
        UserError: there is no such function.
    """
    module, _, function = path.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as fault:
        raise UserError(f"evaluate.judge: cannot load '{path}' ({fault}); write it as module:function") from None
