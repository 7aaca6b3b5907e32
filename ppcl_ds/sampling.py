"""Parts of a recipe's sections: sizes of captions alone, the teacher's trajectories, how often a forward is used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ppcl_ds.strict import Section


def _checked(sizes: dict[str, float]) -> dict[str, float]:
    for size in sizes:
        if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}(x[1-9]\d{0,4})?", size):
            raise ValueError(f"'{size}' is no size; write height x width, such as 768x1344, or 480x832x81 with frames")
    return sizes


Weights = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_checked)]
"""Size -> its weight."""


def drawn(sizes: Mapping[str, float], key: str) -> str:
    """The size of a sample, by a stable hash of its key: `1024x1024`."""
    place = int.from_bytes(hashlib.sha256(f"size of {key}".encode()).digest()[:8], "big") / 2**64
    left = place * sum(sizes.values())
    for size, weight in sizes.items():
        left -= weight
        if left < 0:
            return size
    return size


def _weigh_something(weights: dict[float, float]) -> dict[float, float]:
    if weights and not any(weights.values()):
        raise ValueError("all weights are 0; give one of them another")
    return weights


LevelWeights = Annotated[
    dict[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0)]], AfterValidator(_weigh_something)
]
"""Place on the ladder -> weight of samples there."""


class Replay(Section):
    """Optimizer steps on what the teacher has said before. A reading is its forwards on the micro-batches of a step."""

    uses: int = Field(default=1, gt=0)
    """Optimizer steps for each reading, which is the dearest part of a step; `distill.steps` counts optimizer steps as
    ever. 1: nothing is replayed."""
    ring: int = Field(default=8, gt=0)
    """So many of the newest readings stay in memory, and each step draws one of them: at least twice `uses`."""
    offload: bool = False
    """Keep them in pinned CPU memory, from which they are fetched while the step before is computed. `ppcl estimate`
    says what they take, and whether the accelerator has that."""


def _in_order(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError("the first of both must not be larger than the second")
    return span


class Trajectories(Section):
    """The teacher's own way from noise to images, from captions alone. Every rank has images in the making, as many
    as its micro-batches hold; each teacher forward is read by the units and takes every image one step further."""

    steps: Annotated[tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]], AfterValidator(_in_order)] = (
        10,
        30,
    )
    """Each image is drawn in a number of steps from this range, at noise levels of the density that `noise` names."""
    guidance: Annotated[
        tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]], AfterValidator(_in_order)
    ] = (1.0, 1.0)
    """Each image is drawn with a scale of classifier-free guidance from this range, as the pipeline guides; then the
    teacher also reads every image with the other prompt. [1, 1]: without. A transformer that takes the scale as a
    number gets the pipeline's default, or that of `teacher.options`."""

    of: Literal["teacher", "student"] = "teacher"
    """Whose way it is. `student`, for fine-tuning: the variant's own, so that it learns where its own errors take it.
    Where there is guidance, the branch that it is trained on is its own, and the other one the teacher's."""

    @property
    def forwards(self) -> int:
        """Of the teacher, for each micro-batch."""
        return 2 if self.guidance[1] > 1 else 1
