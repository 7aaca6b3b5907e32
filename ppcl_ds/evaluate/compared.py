"""What prompt sets say: scores of every model, variants against the teacher prompt by prompt, the worst prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from ppcl_ds.console import track
from ppcl_ds.evaluate.drawing import Images, paths
from ppcl_ds.evaluate.layouts import Laid
from ppcl_ds.evaluate.paired import Interval, Paired, interval, paired
from ppcl_ds.evaluate.scores import Kind, Scorer

WORST = 16
"""Prompts that are shown."""
TEACHER = "teacher"
_OF_A_MODEL = ("model", "weights")


class ScoreFigures(BaseModel):
    """One score of one set.

    Attributes:
        more: whether more is better.
        values: model -> its mean over prompts, or the one number of the set.
        differences: variant -> against the teacher, prompt by prompt; none for a score of the set.
    """

    score: str
    kind: Kind
    more: bool
    values: Mapping[str, float]
    differences: Mapping[str, Paired] = {}
    intervals: Mapping[str, Interval] = {}


class Worst(BaseModel):
    """A prompt on which a variant does badly.

    Attributes:
        by: what it was chosen by, and `value` is of.
        images: model -> the file, seen from the run folder.
    """

    prompt: str
    variant: str
    by: str
    value: float
    images: Mapping[str, str]


class SetFigures(BaseModel):
    """What one prompt set says.

    Attributes:
        settings: what the scores depend on, beside the model.
        weights: model -> a digest of all its files.
        official: what the benchmark's own scorer says of each model.
    """

    name: str
    layout: str
    prompts: int
    per_prompt: int
    settings: Mapping[str, Any]
    weights: Mapping[str, str]
    scores: Sequence[ScoreFigures]
    worst: Sequence[Worst]
    official: Mapping[str, Mapping[str, float]] = {}

    def lost(self, model: str, score: str) -> float | None:
        """By how many percent a model's official score is below the teacher's; None: one of them is not there."""
        its, own = (self.official.get(each, {}).get(score) for each in (TEACHER, model))
        return None if own is None or not its or model == TEACHER else 100 * (its - own) / its


def compare(images: Images, scorers: Sequence[Scorer], margins: Mapping[str, float | None]) -> list[SetFigures]:
    """Score what was drawn; `scorers` hold one of kind `to teacher` at least.

    Args:
        margins: score -> what may be lost.

    Raises:
        UserError: a score cannot be taken.
    """
    jobs = [(laid, scorer) for laid in images.sets for scorer in scorers]
    found: dict[str, list[ScoreFigures]] = {laid.settings.name: [] for laid in images.sets}
    judge = next((each for each in scorers if each.alone), next(each for each in scorers if each.to_teacher))
    losses: dict[str, Mapping[str, list[float]]] = {}
    for laid, scorer in track(jobs, "score", len(jobs)):
        figures, by_prompt = _figures(laid, scorer, paths(images, laid), margins.get(scorer.name))
        found[laid.settings.name].append(figures)
        if scorer is judge:
            losses[laid.settings.name] = by_prompt
    return [
        SetFigures(
            name=laid.settings.name,
            layout=laid.settings.layout,
            prompts=len(laid.prompts),
            per_prompt=laid.per_prompt,
            settings={name: value for name, value in images.facts(laid, TEACHER).items() if name not in _OF_A_MODEL},
            weights={model: images.facts(laid, model)["weights"] for model in images.models},
            scores=found[laid.settings.name],
            worst=_worst(images, laid, judge, losses[laid.settings.name]),
        )
        for laid in images.sets
    ]


def _figures(
    laid: Laid, scorer: Scorer, where: Mapping[str, list[list[Path]]], margin: float | None
) -> tuple[ScoreFigures, dict[str, list[float]]]:
    """A score's figures, and by what each variant's worst prompts are chosen; nothing of a score of the set."""
    flat = {model: [path for cells in prompts for path in cells] for model, prompts in where.items()}
    variants = [model for model in where if model != TEACHER]
    common: dict[str, Any] = {"score": scorer.name, "kind": scorer.kind, "more": scorer.more}
    if scorer.of_set:
        reference = scorer.reference or flat[TEACHER]
        models = [*where] if scorer.reference else variants
        return ScoreFigures(**common, values={m: scorer.of_set(flat[m], reference) for m in models}), {}
    differences: dict[str, Paired] = {}
    if scorer.to_teacher:
        each = {model: _by_prompt(scorer.to_teacher(flat[model], flat[TEACHER]), laid) for model in variants}
        lost = each
    else:
        assert scorer.alone is not None
        texts = [prompt.text for prompt in laid.prompts for _ in range(laid.per_prompt)]
        each = {model: _by_prompt(scorer.alone(flat[model], texts), laid) for model in where}
        differences = {model: paired(each[TEACHER], each[model], margin) for model in variants}
        lost = {m: [own - its for own, its in zip(each[m], each[TEACHER], strict=True)] for m in variants}
    values = {model: float(np.mean(numbers)) for model, numbers in each.items()}
    spread = {model: interval(numbers) for model, numbers in each.items()}
    return ScoreFigures(**common, values=values, differences=differences, intervals=spread), lost


def _by_prompt(values: Sequence[float], laid: Laid) -> list[float]:
    """The mean over a prompt's images."""
    return np.asarray(values, dtype=np.float64).reshape(-1, laid.per_prompt).mean(axis=1).tolist()


def _worst(images: Images, laid: Laid, judge: Scorer, losses: Mapping[str, list[float]]) -> list[Worst]:
    """The prompts on which variants do worst, each variant's own, as the first image of each shows them."""
    found = []
    sign = 1 if judge.more else -1
    by = f"{judge.name}, variant minus teacher" if judge.alone else judge.name
    for variant, values in losses.items():
        for position in np.argsort(sign * np.asarray(values), kind="stable")[:WORST].tolist():
            shown = {
                model: str(images.of(laid, model, position, 0).path.relative_to(images.recipe.run))
                for model in (TEACHER, variant)
            }
            text = laid.prompts[position].text
            found.append(Worst(prompt=text, variant=variant, by=by, value=values[position], images=shown))
    return found
