"""The page's sections on training: curves of units and variants, and what everything took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from markupsafe import Markup

from ppcl_ds.recipe import Recipe, TrainingFolder, written_recipe
from ppcl_ds.record import Record
from ppcl_ds.report.charts import Axis, Curve, number, plot
from ppcl_ds.reporting import Report, read_report
from ppcl_ds.sections import Distill, Finetune
from ppcl_ds.watch.tensorboard import read_scalars, unit_losses

_NEIGHBOURS = 20
"""A curve is smoothed over one in so many of its points."""
_OUTSIDE = ("seconds/checkpoint", "seconds/preview")
_HELDOUT = {"velocity_mse": "velocity MSE", "guided_mse": "guided velocity MSE", "short_mse": "few-step MSE"}
"""Figures of held-out data that have a plot, and what they are called."""

Scalars = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Small:
    """One of many plots alike."""

    name: str
    first: float
    last: float
    drawing: Markup


@dataclass(frozen=True)
class Trained:
    """What the page shows of one training.

    Attributes:
        heldout: variants' errors on held-out data, a plot each; none: nothing was looked at yet.
        units: each unit's loss on axes that all share.
        window: points that a smoothed one is the mean of.
        curves: what `heldout` and `losses` draw, for the legend: name -> colour.
    """

    command: str
    report: Report
    heldout: Sequence[Markup]
    losses: Markup | None
    units: Sequence[Small]
    window: int
    curves: Mapping[str, int]


@dataclass(frozen=True)
class Bill:
    """What one command took.

    Attributes:
        steps: of the optimizer; 0: none.
        samples: read; 0: not counted.
        forwards: samples that the teacher has answered; 0: not counted.
        hours: of the clock.
        processes: at the end; each holds an accelerator where there is one.
    """

    command: str
    steps: int
    samples: int
    forwards: int
    hours: float
    accelerator_hours: float
    processes: int
    device: str


def scalars_of(folder: TrainingFolder) -> Scalars:
    """What TensorBoard has of a training; nothing where it has not begun."""
    return read_scalars(folder.board) if folder.board.exists() else {}


def trained(recipe: Recipe, boards: Mapping[TrainingFolder, Scalars], colours: Mapping[str, int]) -> list[Trained]:
    """Curves of every training that has begun.

    Args:
        colours: of the variants.
    """
    found = []
    for folder, scalars in boards.items():
        if scalars:
            draw = _distilled if folder.command == "distill" else _tuned
            found.append(draw(folder, scalars, colours))
    return found


def _distilled(folder: TrainingFolder, scalars: Scalars, colours: Mapping[str, int]) -> Trained:
    heldout: list[Markup] = []
    shown: dict[str, int] = {}
    for figure, title in _HELDOUT.items():
        before = f"heldout/{figure}/"  # what follows a variant's name is a noise level
        looks = {name.removeprefix(before): points for name, points in scalars.items() if name.startswith(before)}
        variants = {name: points for name, points in looks.items() if "/" not in name}
        shown |= {name: colours.get(name, 0) for name in variants}
        curves = [Curve(name, points, shown[name], dots=len(points) < 30) for name, points in variants.items()]
        if curves:
            heldout.append(plot(curves, "step", f"{title} on held-out data, log scale", log=True))
    losses = {name: points for name, points in unit_losses(scalars).items() if points}
    shared = Axis([value for points in losses.values() for _, value in points], log=True)
    small = []
    for name, points in sorted(losses.items()):
        lines = [Curve(name, points, faint=True), Curve(name, smoothed(points))]
        drawn = plot(lines, "step", "loss", log=True, height=110, frame=shared)
        small.append(Small(name, points[0][1], smoothed(points)[-1][1], drawn))
    window = max((_window(points) for points in losses.values()), default=1)
    return Trained("distill", read_report(folder.progress), heldout, None, small, window, shown)


def _tuned(folder: TrainingFolder, scalars: Scalars, colours: Mapping[str, int]) -> Trained:
    colour = colours.get(folder.variant, 0)
    loss = scalars.get("run/loss", ())
    lines = [Curve("loss", loss, colour, faint=True), Curve("loss", smoothed(loss), colour)] if loss else []
    quantiles: dict[int, list[float]] = {}
    for name, points in scalars.items():
        if name.startswith("heldout/velocity/"):
            for step, value in points:
                quantiles.setdefault(step, []).append(value)
    looks = [(step, sum(values) / len(values)) for step, values in sorted(quantiles.items())]
    seen = [Curve(folder.variant, looks, colour, dots=len(looks) < 30)] if looks else []
    return Trained(
        f"finetune --variant {folder.variant}",
        read_report(folder.progress),
        [plot(seen, "step", "velocity error on held-out data, log scale", log=True, height=180)] if seen else [],
        plot(lines, "step", "loss, log scale", log=True, height=180) if lines else None,
        (),
        _window(loss),
        {folder.variant: colour},
    )


def _window(points: Sequence[tuple[int, float]]) -> int:
    return max(1, len(points) // _NEIGHBOURS * 2 + 1)


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each value as the mean of itself and its neighbours, as many on either side; at the ends fewer."""
    reach, values = _window(points) // 2, [value for _, value in points]
    means = []
    for place, (step, _) in enumerate(points):
        side = min(reach, place, len(points) - 1 - place)
        near = values[place - side : place + side + 1]
        means.append((step, sum(near) / len(near)))
    return means


def bills(recipe: Recipe, boards: Mapping[TrainingFolder, Scalars], record: Record) -> list[Bill]:
    """What every command of the run took, as far as it is known, in the order of the road."""
    found = [_recorded(recipe, "probe", record)]
    for folder, scalars in boards.items():
        if scalars and (section := _section(folder, recipe)):
            found.append(_training(folder, scalars, section, record))
    found += [_recorded(recipe, name, record) for name in ("plan", "consolidate", "evaluate")]
    return [bill for bill in found if bill is not None]


def _section(folder: TrainingFolder, recipe: Recipe) -> Distill | Finetune | None:
    """What a training was begun with; where that is not written down, what the recipe says now."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        recipe = written_recipe(folder.recipe.read_bytes())
    return recipe.distill if folder.command == "distill" else recipe.finetune


def _recorded(recipe: Recipe, name: str, record: Record) -> Bill | None:
    commands = [each for each in record.commands if each.name.split()[0] == name]
    if not commands:
        return None
    read = recipe.probe.batches * recipe.probe.batch_size if name == "probe" else 0
    hours = sum(each.seconds for each in commands) / 3600
    total = sum(each.seconds * each.processes for each in commands) / 3600
    return Bill(name, 0, read, 0, hours, total, commands[-1].processes, commands[-1].device)


def _training(folder: TrainingFolder, scalars: Scalars, section: Distill | Finetune, record: Record) -> Bill:
    """From what was logged: work that was lost to a fault counts once, starting up does not."""
    per_step = section.micro_batch * section.micro_batches_per_step
    ranks: dict[int, int] = {}
    for name, points in scalars.items():
        if name.startswith("memory_gib/rank_"):
            for step, _ in points:
                ranks[step] = ranks.get(step, 0) + 1
    outside = [dict(scalars.get(name, ())) for name in _OUTSIDE]
    seconds = total = 0.0
    before = 0
    for step, rate in scalars.get("run/samples_per_second", ()):
        spent = (step - before) * per_step / rate + sum(each.get(step, 0.0) for each in outside)
        seconds, total, before = seconds + spent, total + spent * ranks.get(step, 1), step
    forwards = before * per_step
    if isinstance(section, Distill):
        forwards //= section.replay.uses
    elif not section.velocity_weight:
        forwards = 0
    if section.trajectories:
        forwards *= section.trajectories.forwards
    command = " ".join(filter(None, (folder.command, folder.variant)))
    told = [each.device for each in record.commands if each.name == command]
    return Bill(
        command,
        before,
        before * per_step,
        forwards,
        seconds / 3600,
        total / 3600,
        ranks.get(before, 1),
        told[-1] if told else "",
    )


def duration(hours: float) -> str:
    """A time as people say it."""
    if hours >= 1:
        return f"{number(hours)} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"
