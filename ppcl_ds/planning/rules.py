"""Span rules: each cuts spans out of the block lists until a variant gives up its share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from ppcl_ds.errors import UserError
from ppcl_ds.planning.budget import Budget
from ppcl_ds.planning.programme import Candidates, cheapest
from ppcl_ds.probing.report import MEAN, ProbeReport
from ppcl_ds.sections import Rule

Span = tuple[int, int]


@dataclass(frozen=True)
class RuleInputs:
    """What every rule chooses on.

    Attributes:
        report: what the probe found.
        budget: what blocks weigh.
        lists: block numbers of each block list.
        allowed: the spans that a unit can take the place of.
        max_span: longest span, in blocks, of rule `error`.
        seed: of rule `random`.
        given: the spans of rule `given`.
    """

    report: ProbeReport
    budget: Budget
    lists: Sequence[Sequence[int]]
    allowed: Set[Span]
    max_span: int
    seed: int
    given: Sequence[Span]

    def saved(self, spans: Iterable[Span]) -> float:
        """What spans give up: all their blocks but the first, which the unit is as large as."""
        return float(sum(self.budget.blocks[u + 1 : v + 1].sum() for u, v in spans))


def spans_by(rule: Rule, inputs: RuleInputs, share: float) -> list[Span] | None:
    """The spans that a rule chooses for a variant that gives up `share`; None where it cannot."""
    return _RULES[rule](inputs, share)


def least_error(inputs: RuleInputs, spans: Iterable[Span], share: float) -> list[Span] | None:
    """Of the given spans, those of least total `error(u, v)` that give up `share`."""
    errors = {(u, v): inputs.report.error[u][v] for u, v in sorted(spans)}
    known = {span: error for span, error in errors.items() if error is not None}
    candidates = Candidates(
        footprints=[frozenset(range(u, v + 1)) for u, v in known],
        saved=np.array([inputs.saved([span]) for span in known]),
        errors=np.array(list(known.values())),
        pairs=np.zeros((len(known), len(known))),
    )
    goal = share * inputs.budget.total
    chosen = cheapest(candidates, goal - inputs.budget.slack, goal + inputs.budget.slack)
    return None if chosen is None else [list(known)[index] for index in chosen]


def _error(inputs: RuleInputs, share: float) -> list[Span] | None:
    """Any spans up to the longest: the least total error."""
    return least_error(inputs, [(u, v) for u, v in inputs.allowed if v - u < inputs.max_span], share)


def _ppcl(inputs: RuleInputs, share: float) -> list[Span] | None:
    """The paper's spans, those of least total error (the paper does not say how to choose among them).

    Where all of them together do not give up the share, neighbours may become one.
    """
    spans = [span for span in inputs.report.spans if span in inputs.allowed]
    if inputs.saved(spans) < share * inputs.budget.total - inputs.budget.slack:
        runs = [(first[0], last[1]) for at, first in enumerate(spans) for last in _neighbours(spans[at:])]
        spans = [span for span in runs if span in inputs.allowed]
    return least_error(inputs, spans, share)


def _neighbours(spans: Sequence[Span]) -> list[Span]:
    """The first span and those that follow without a gap."""
    gaps = [place for place, (a, b) in enumerate(pairwise(spans), 1) if b[0] > a[1] + 1]
    return list(spans[: min(gaps, default=len(spans))])


def _given(inputs: RuleInputs, share: float) -> list[Span] | None:
    """The spans of a plan file: the least total error."""
    return least_error(inputs, inputs.given, share)


def _influence(inputs: RuleInputs, share: float) -> list[Span] | None:
    """Blocks of least influence go first (Block Influence, arXiv 2403.03853); the block before them takes over."""
    figure = inputs.report.figures.get(MEAN, {}).get("influence")
    if figure is None:
        raise UserError("the probe report has no figures of influence; run `ppcl probe` again")
    influence = [math.inf if value is None else value for value in figure.value[0]]
    return _by_order(inputs, share, sorted(range(len(influence)), key=influence.__getitem__))


def _random(inputs: RuleInputs, share: float) -> list[Span] | None:
    """Blocks go in random order; what any rule has to beat."""
    return _by_order(inputs, share, np.random.default_rng(inputs.seed).permutation(len(inputs.budget.blocks)).tolist())


def _by_order(inputs: RuleInputs, share: float, order: Iterable[int]) -> list[Span] | None:
    """Blocks go one after another until the share is reached; each run of them falls to the block before it."""
    goal = share * inputs.budget.total
    gone: set[int] = set()
    for block in order:
        spans = _spans_without(gone | {block})
        if set(spans) <= inputs.allowed and inputs.saved(spans) <= goal + inputs.budget.slack:
            gone.add(block)
            if inputs.saved(spans) >= goal - inputs.budget.slack:
                return spans
    return None


def _spans_without(gone: set[int]) -> list[Span]:
    """Spans whose first block stays and whose others are the blocks of `gone`."""
    runs = [[block for _, block in run] for _, run in groupby(enumerate(sorted(gone)), lambda item: item[1] - item[0])]
    return [(run[0] - 1, run[-1]) for run in runs]


def _uniform(inputs: RuleInputs, share: float) -> list[Span]:
    """Each list keeps its share of blocks, spread evenly; spans are as equal in length as can be."""
    spans = []
    for blocks in inputs.lists:
        # Where no unit can close the list, its last block stays by itself.
        closes = len(blocks) < 2 or (blocks[-2], blocks[-1]) in inputs.allowed
        body = blocks if closes else blocks[:-1]
        kept = max(1, round(len(blocks) * (1 - share)) - (not closes))
        edges = [round(group * len(body) / kept) for group in range(kept + 1)]
        spans += [(body[a], body[b - 1]) for a, b in pairwise(edges) if b - a > 1]
    return spans


_RULES: dict[Rule, Callable[[RuleInputs, float], list[Span] | None]] = {
    "error": _error,
    "ppcl": _ppcl,
    "influence": _influence,
    "uniform": _uniform,
    "random": _random,
    "given": _given,
}
