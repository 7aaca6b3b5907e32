"""Sections of a recipe for `ppcl evaluate`: prompt sets to draw, and scores of what is drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ppcl_ds.strict import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$", max_length=100)]
"""Of a folder."""

LayoutName = Literal["folder", "geneval", "dpg", "longtext", "oneig", "compbench", "hpsv2", "geneval2"]


class PromptSet(Section):
    """Prompts that teacher and variants draw, and how the images are laid out; see `docs/evaluation.md`."""

    name: Name
    """The images go to `{run}/evaluate/NAME`."""
    prompts: Path
    """Your copy of a benchmark's prompts, as it is published; for `folder` a text file, a prompt a line."""
    layout: LayoutName = "folder"
    """Whose scorer is to read the images."""
    per_prompt: int = Field(default=0, ge=0, le=100)
    """Images of each prompt. Default: as many as the scorer expects; for `folder` one."""
    size: int = Field(default=0, ge=0, le=65536)
    """Pixels of a side. Default: `data.images.size`."""


SCORES = ("psnr", "lpips", "dists", "clip", "preference", "clip_image", "fid", "kid", "cmmd")


class Score(Section):
    """A score of the images of every prompt set."""

    score: str
    """One of those in `docs/evaluation.md`, or `module:function`, which is called with a list of PIL images and the
    list of their prompts, and returns a number for each; more is better."""
    model: Path | None = None
    """Folder of the score's model, as transformers saves it; of `lpips` and `dists` the file of torchvision's VGG-16.
    Nothing is downloaded."""
    margin: float | None = Field(default=None, gt=0)
    """A variant is no worse than the teacher if, at 95 % confidence, it loses less than this. Default: 2 % of the
    teacher's mean."""
    reference: Path | None = None
    """Folder of real images for `fid`, `kid` and `cmmd`. Default: the teacher's images."""

    @model_validator(mode="after")
    def _is_known(self) -> Score:
        if self.score not in SCORES and not re.fullmatch(r"[\w.]+:\w+", self.score):
            raise ValueError(f"score '{self.score}' is not known; known: {', '.join(SCORES)}, or module:function")
        return self


class Drawn(Section):
    """What `evaluate` says of prompt sets and their scores."""

    sets: tuple[PromptSet, ...] = ()
    """Prompt sets that teacher and variants draw, with `steps` and `guidance`."""
    scores: tuple[Score, ...] = ()
    """Scores of these images."""
    sharded: bool | None = None
    """Spread each model over all processes (ZeRO-3) while it draws prompt sets. Default: where teacher and text
    encoders do not fit on one GPU."""

    @model_validator(mode="after")
    def _has_names_of_their_own(self) -> Drawn:
        for what, names in (("sets", [s.name for s in self.sets]), ("scores", [s.score for s in self.scores])):
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{what} names '{twice}' twice")
        return self
