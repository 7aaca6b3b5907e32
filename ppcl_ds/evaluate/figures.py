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
from ppcl_ds.teacher.heldout import GuidedHeldOut, HeldOut, by_noise, mean_squared
from ppcl_ds.teacher.noising import DTYPES, NoisyStream
from ppcl_ds.teacher.pipeline_call import Arguments
from ppcl_ds.teacher.teacher import Teacher, forward

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
        guided_mse: the same of velocities with the recipe's guidance; None where it is not known how that is done.
        branch_mse: the same of what the velocities with and without the prompt differ by; None where guidance does not
            read both.
        short_mse: mean squared difference from the teacher's latents drawn from the same noise in `evaluate.few_steps`
            steps; None in reports of earlier versions.
        sample_mse: the same in `evaluate.steps` steps.
        by_noise: mean place on the ladder of noise (0 is pure noise) and the velocity error there, for fifths of the
            held-out samples.
        guided_by_noise, branch_by_noise: likewise.
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
    guided_mse: float | None = None
    branch_mse: float | None = None
    short_mse: float | None = None
    sample_mse: float
    by_noise: Sequence[tuple[float, float]] = ()
    guided_by_noise: Sequence[tuple[float, float]] = ()
    branch_by_noise: Sequence[tuple[float, float]] = ()
    weights: str | None = None

    @property
    def errors(self) -> dict[str, float | None]:
        """What is compared with the teacher, by title."""
        return {
            "velocity MSE": self.velocity_mse,
            "guided velocity MSE": self.guided_mse,
            "branch MSE": self.branch_mse,
            "few-step MSE": self.short_mse,
            "sample MSE": self.sample_mse,
        }

    @property
    def curves(self) -> dict[str, Sequence[tuple[float, float]]]:
        """Those that there are of noise levels, likewise."""
        curves = zip(list(self.errors)[:3], (self.by_noise, self.guided_by_noise, self.branch_by_noise), strict=True)
        return {title: curve for title, curve in curves if curve}


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
        self.drawings, self.short = (
            Drawing.several(recipe, teacher.call, stored.noiser, samples, settings.batch_size, steps=steps)
            for steps in (settings.steps, settings.few_steps)
        )
        self.guided = GuidedHeldOut(recipe, teacher, device)
        self.others = {
            name: place(load_model(teacher.path / name, self.dtype), device, fits)
            for name in teacher.call.transformers()
            if name != teacher.component
        }
        self.judge = load_judge(settings.judge) if settings.judge else None
        self.teacher_velocities: list[Tensor] = []
        self.teacher_latents: list[Tensor] = []
        self.teacher_short: list[Tensor] = []
        self.teacher_guided: dict[str, list[Tensor]] = {}
        self.teacher_blocks = 0

    def measure(self, name: str, model: nn.Module, decode: Callable[..., Tensor]) -> tuple[ModelFigures, Tensor]:
        """All figures of one model, and its images (N, C, height, width) in [-1, 1].

        Args:
            model: already in the recipe's dtype; it can be run on the device.
        """
        velocities = self.heldout.velocities(model)
        guided = self.guided.says(model)
        latents, images = self._draw(self.drawings, model, decode)
        short, _ = self._draw(self.short, model)
        blocks = Anatomy(model, self.teacher.flows).block_parameters
        if not self.teacher_latents:
            self.teacher_velocities, self.teacher_latents, self.teacher_blocks = velocities, latents, blocks
            self.teacher_short, self.teacher_guided = short, guided
        means = {name: mean_squared(said, self.teacher_guided[name]) for name, said in guided.items()}
        curves = {name: by_noise(said, self.teacher_guided[name], self.guided.places) for name, said in guided.items()}
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
            guided_mse=means.get("velocity"),
            branch_mse=means.get("branches"),
            short_mse=mean_squared(short, self.teacher_short),
            sample_mse=mean_squared(latents, self.teacher_latents),
            by_noise=by_noise(velocities, self.teacher_velocities, [batch.places for batch in self.heldout.batches]),
            guided_by_noise=curves.get("velocity", ()),
            branch_by_noise=curves.get("branches", ()),
        )
        return figures, images

    def _draw(
        self, drawings: Sequence[Drawing], model: nn.Module, decode: Callable[..., Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Latents, a batch at a time, and all images, if they are decoded."""
        models = self.others | {self.teacher.component: model}
        answers = {name: partial(self._answer, each) for name, each in models.items()}
        drawn = [drawing.draw(answers, decode) for drawing in drawings]
        images = [each for _, each in drawn if each is not None]
        return [latents for latents, _ in drawn], torch.cat(images) if images else torch.empty(0)

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
