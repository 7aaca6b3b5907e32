"""What the figures of a run say in words: of each variant how large, how fast and how good, and which one to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ppcl_ds.early import UNDISTILLED, untuned
from ppcl_ds.evaluate.compared import SetFigures
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.evaluate.paired import Verdict
from ppcl_ds.evaluate.speed import Speed, gains
from ppcl_ds.report.charts import number

_MARGIN = 0.02
"""Of the teacher's accuracy that may be lost, as of scores of prompt sets."""
_NORMAL = 1.959964
"""Of 95 % confidence."""
_SHARES = {1 / 4: "a quarter", 1 / 3: "a third", 1 / 2: "half", 2 / 3: "two thirds", 3 / 4: "three quarters"}


class Difference(NamedTuple):
    """A share less another, and where it lies at 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Judged:
    """What is said of one variant.

    Attributes:
        speed: times as fast as the teacher.
        quality: each a sentence.
        verdicts: by every measure of quality that compares with the teacher.
        seen: whether its images were judged, even if nobody knows how many they were.
    """

    name: str
    size: str
    faster: str
    speed: float
    params: int
    share: float
    quality: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    seen: bool = False

    @property
    def verdict(self) -> Verdict | None:
        """All measures together; None: there are none."""
        if not self.verdicts:
            return None
        return next((each for each in ("worse", "undecided") if each in self.verdicts), "no worse")

    @property
    def sentence(self) -> str:
        return f"{self.size}, {self.faster}, {'; '.join(self.quality)}"


def judge(models: Sequence[ModelFigures], sets: Sequence[SetFigures], speed: Sequence[Speed]) -> list[Judged]:
    """Every variant that was evaluated, the largest first; models that were not trained are none."""
    teacher = next((model for model in models if model.name == "teacher"), None)
    if teacher is None:
        return []
    rows = {model.name: model for model in models}
    found = [
        _judged(model, teacher, rows.get(untuned(name) + UNDISTILLED), sets, speed)
        for name, model in rows.items()
        if model is not teacher and not name.endswith(UNDISTILLED)
    ]
    return sorted(found, key=lambda each: -each.params)


def chosen(judged: Sequence[Judged]) -> Judged | None:
    """The smallest one that nothing shows to be worse and everything shows not to be; of equals the faster one."""
    good = [each for each in judged if each.verdict == "no worse"]
    return min(good, key=lambda each: (each.params, -each.speed), default=None)


def headline(judged: Sequence[Judged]) -> str:
    """The run in one sentence, of the chosen variant if there is one."""
    best = chosen(judged)
    if best is not None:
        return f"{best.sentence}."
    if all(each.verdict is None for each in judged):
        if any(each.seen for each in judged):
            return "How sure these figures are is not known, as an earlier release measured them: evaluate again."
        return (
            "How good the variants are has not been judged: name evaluate.judge, or evaluate.sets with scores, in the "
            "recipe. How near their images are to the teacher's stands below."
        )
    worse = [each.name for each in judged if each.verdict == "worse"]
    rest = [each.name for each in judged if each.verdict == "undecided"]
    told = [f"{' and '.join(worse)}: worse than the teacher"] if worse else []
    told += [f"{' and '.join(rest)}: undecided, more prompts would tell"] if rest else []
    return f"No variant is shown to be as good as the teacher ({'; '.join(told)})."


def share_in_words(share: float) -> str:
    """`half`, or `58 %`."""
    near = min(_SHARES, key=lambda known: abs(known - share))
    return _SHARES[near] if abs(near - share) < 0.01 else f"{100 * share:.0f} %"


def newcombe(first: float, second: float, count: int) -> Difference:
    """The first share less the second, each of `count` images, with a 95 % interval (Newcombe 1998, method 10).

    The shares count as independent, which makes the interval wide: images of one prompt and noise are not.
    """
    (low_1, high_1), (low_2, high_2) = (_wilson(share, count) for share in (first, second))
    value = first - second
    return Difference(
        value,
        value - math.hypot(first - low_1, high_2 - second),
        value + math.hypot(high_1 - first, second - low_2),
    )


def _wilson(share: float, count: int) -> tuple[float, float]:
    square = _NORMAL**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    reach = _NORMAL / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return centre - reach, centre + reach


def _judged(
    model: ModelFigures,
    teacher: ModelFigures,
    untrained: ModelFigures | None,
    sets: Sequence[SetFigures],
    speed: Sequence[Speed],
) -> Judged:
    times, faster = _speed(model, teacher, speed)
    size = f"{share_in_words(model.block_params_ratio)} of the block parameters"
    judged = model.accuracy is not None
    found = Judged(model.name, size, faster, times, model.params, model.block_params_ratio, seen=judged)
    if model.accuracy is not None and teacher.accuracy is not None:
        verdict, words = _accuracy(model.accuracy, teacher.accuracy, min(model.images, teacher.images))
        found.quality.append(words)
        found.verdicts.extend([verdict] if verdict else [])
    for each in sets:
        for score in each.scores:
            if (difference := score.differences.get(model.name)) is not None:
                link = "at" if difference.verdict == "undecided" else "by"
                than = "" if difference.verdict == "undecided" else " than the teacher"
                found.verdicts.append(difference.verdict)
                found.quality.append(
                    f"{difference.verdict}{than} {link} {number(difference.margin)} in {score.score} on {each.name} "
                    f"({difference.mean:+.3g}, 95 % interval {difference.low:+.3g} to {difference.high:+.3g})"
                )
    if not found.verdicts and untrained is not None and model.sample_mse:
        nearer = untrained.sample_mse / model.sample_mse
        found.quality.append(
            f"its images {number(nearer)} times nearer to the teacher's than the same blocks untrained "
            f"(sample MSE {number(model.sample_mse)} against {number(untrained.sample_mse)})"
        )
    return found


def _speed(model: ModelFigures, teacher: ModelFigures, speed: Sequence[Speed]) -> tuple[float, str]:
    """End to end where that was measured, at the largest size and one image; else of a forward."""
    times = {
        size: ratio
        for (name, way, size, batch), ratio in gains(speed).items()
        if (name, way, batch) == (model.name, "plain", 1)
    }
    if times:
        size = max(times)
        return times[size], f"{times[size]:.1f} times as fast, prompt to pixels at {size} px"
    ratio = teacher.latency_ms / model.latency_ms
    forwards = f"{number(model.latency_ms)} ms a forward, the teacher {number(teacher.latency_ms)} ms"
    return ratio, f"{ratio:.1f} times as fast ({forwards})"


def _accuracy(own: float, teacher: float, count: int) -> tuple[Verdict | None, str]:
    if not count:
        return None, f"{_percent(own)} of its images show what was asked, of the teacher's {_percent(teacher)}"
    margin, (value, low, high) = _MARGIN * teacher, newcombe(own, teacher, count)
    verdict: Verdict = "no worse" if low > -margin else "worse" if high < -margin else "undecided"
    words = {
        "no worse": f"no worse than the teacher in prompt accuracy within {100 * margin:.1f} points",
        "worse": f"worse than the teacher in prompt accuracy by more than {100 * margin:.1f} points",
        "undecided": f"undecided in prompt accuracy at {100 * margin:.1f} points",
    }[verdict]
    interval = f"{100 * value:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {count} images each"
    return verdict, f"{words} ({_percent(own)}, the teacher {_percent(teacher)}: {interval})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
