"""What models are held against the teacher on, a rank's share of it: velocities with guidance, and few-step draws.

Shapes: B samples; latents as the scheduler steps them, (B, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ppcl_ds.data.batch import Batch, Sample, Size
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.branches import Answer, Branches, Sampled
from ppcl_ds.teacher.drawing import Drawing
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.teacher import Teacher

FIGURES = {"velocity": "guided_mse", "branches": "branch_mse", "draw": "short_mse"}
"""Measure -> what reports and TensorBoard call its mean squared difference from the teacher."""


def measures_of(recipe: Recipe, call: PipelineCall) -> tuple[str, ...]:
    """What can be measured of a model: `branches` only where guidance reads both, `draw` only of one transformer."""
    branches = ("branches",) if call.reads_both(recipe.evaluate.guidance) else ()
    return ("velocity", *branches, *(("draw",) if len(call.transformers()) == 1 else ()))


@dataclass(frozen=True)
class Piece:
    """A micro-batch, or some prompts that are drawn together.

    Attributes:
        counts: whether this rank's figures of it do; all ranks get equally many, as they run the teacher together.
        size: of its samples.
        says: what a model makes of it, by measure, (B, ...) float32 on the CPU.
        levels: (B,) int64, of the noise; None: it has none.
    """

    counts: bool
    size: Size
    says: Callable[[Answer], dict[str, Tensor]]
    levels: Tensor | None = None


class Comparison:
    """The same held-out data and noise for every model.

    Args:
        teacher_says: the teacher, which draws images where there are captions alone; every rank must ask it.
        rank: whose share this is,
        ranks: of so many.
        micro_batch: samples of a micro-batch.
        first: the micro-batch that this begins with,
        batches: and how many there are.
        prompts: that are drawn,
        number: of the first of them, which its noise follows from.

    Raises:
        UserError: see `Branches` and `Drawing`.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        teacher_says: Answer,
        device: torch.device,
        rank: int,
        ranks: int,
        *,
        micro_batch: int,
        first: int,
        batches: int,
        prompts: Sequence[Sample],
        number: int,
    ) -> None:
        self.component, self.device = teacher.component, device
        self.branches = Branches(recipe, teacher.call, micro_batch)
        self.clean: list[tuple[bool, int, Batch]] = []
        for own in range(rank, -(-batches // ranks) * ranks, ranks):
            clean = self.branches.clean(first + own % batches, 1, teacher_says, device)
            self.clean.append((own < batches, *next(clean)))
        noiser, most, steps = self.branches.stream.noiser, recipe.evaluate.batch_size, recipe.evaluate.few_steps
        drawn = "draw" in measures_of(recipe, teacher.call)
        self.drawings = (
            Drawing.shared(recipe, teacher.call, noiser, prompts, most, rank, ranks, number, steps) if drawn else []
        )

    def __len__(self) -> int:
        return len(self.clean) + len(self.drawings)

    def __iter__(self) -> Iterator[Piece]:
        """This rank's pieces, made when their turn comes."""
        for counts, number, batch in self.clean:
            sampled = self.branches.noisy(number, batch)
            says = partial(self._says, sampled=sampled.to(self.device))
            yield Piece(counts, batch.size, says, sampled.levels)
        for counts, drawing in self.drawings:
            yield Piece(counts, drawing.size, partial(self._draws, drawing=drawing))

    def _says(self, ask: Answer, sampled: Sampled) -> dict[str, Tensor]:
        return self.branches.says(ask, sampled)

    def _draws(self, ask: Answer, drawing: Drawing) -> dict[str, Tensor]:
        return {"draw": drawing.latents(self.component, ask, self.device).cpu()}
