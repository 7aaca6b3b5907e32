"""`report.html`: one page for a whole run, made anew from what lies in its folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import yaml
from markupsafe import Markup

from ppcl_ds.atomic import atomic_write
from ppcl_ds.early import UNDISTILLED, untuned
from ppcl_ds.errors import UserError
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.evaluate.report import Figures, read_report
from ppcl_ds.evaluate.speed import gains, read_speed
from ppcl_ds.export.card import reported
from ppcl_ds.pages import inline, render
from ppcl_ds.probing.report import load_report
from ppcl_ds.recipe import Recipe, TrainingFolder
from ppcl_ds.record import read_record, this_command
from ppcl_ds.report import pictures, plan, probe, training
from ppcl_ds.report.charts import COLOURS, HEAT, Curve, number, plot
from ppcl_ds.report.verdict import chosen, headline, judge, share_in_words

PAGE = "report.html"
Value = TypeVar("Value")


def write_page(recipe: Recipe) -> Path:
    """Write the page of what a run has so far; what it does not have is left out, with the command that makes it.

    Raises:
        UserError: there is no run folder yet.
    """
    if not recipe.run.is_dir():
        raise UserError(f"{recipe.run} is not there: nothing of this run has been done; begin with `ppcl probe RECIPE`")
    path = recipe.run / PAGE
    own = path.with_name(f".{PAGE}.{os.getpid()}")  # jobs of an array may make it at once
    try:
        atomic_write(own, render("ppcl_ds.report", "page.html.jinja", **_values(recipe)))
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)
    return path


def _values(recipe: Recipe) -> dict[str, Any]:
    run, record = recipe.run, read_record(recipe.run)
    folders = TrainingFolder.all_of(run)
    boards = {folder: training.scalars_of(folder) for folder in folders}
    probed, no_probe = _tried(lambda: probe.section(load_report(recipe.probe_folder)))
    planned, no_plan = _tried(lambda: plan.section(recipe))
    figures, no_figures = _tried(lambda: read_report(run / "report.json"))
    figures = figures or Figures(models=[])
    speed = read_speed(run)
    judged = judge(figures.models, figures.sets, speed)
    colours = _colours(recipe, planned, figures.models)
    names = [model.name for model in figures.models]
    times = {each.name: each.speed for each in judged}
    return {
        "run": run,
        "title": run.resolve().name,
        "now": this_command("report"),
        "date": datetime.now(timezone.utc).strftime("%d %B %Y").lstrip("0"),
        "teacher": (probed.report.teacher if probed else "") or (planned.plan.teacher if planned else ""),
        "recipe": recipe,
        "recipe_text": yaml.safe_dump(
            recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True
        ),
        "judged": judged,
        "best": chosen(judged),
        "headline": headline(judged) if judged else "",
        "models": figures.models,
        "times": times,
        "facts": figures.facts,
        "sets": figures.sets,
        "reported": reported(planned.plan.teacher, planned.plan.blocks) if planned else "",
        "picture": lambda name: pictures.picture(run / name, ""),
        "speed": speed,
        "gains": gains(speed),
        "front": _fronts(figures.models, colours) if judged else (),
        "noise": _noise(figures.models, colours),
        "pictures": pictures.section(run, names),
        "samples": inline((run / "samples.png").read_bytes()) if (run / "samples.png").exists() else None,
        "bills": training.bills(recipe, boards, record),
        "trained": training.trained(recipe, boards, colours),
        "plan": planned,
        "probe": probed,
        "commands": list(record.commands),
        "folders": _folders(recipe),
        "colours": colours,
        "missing": _missing(recipe, boards, no_probe, no_plan, no_figures),
        "heat": HEAT,
        "number": number,
        "share": share_in_words,
        "duration": training.duration,
        "untuned": untuned,
        "version": version("ppcl-ds"),
    }


def _tried(read: Callable[[], Value]) -> tuple[Value | None, str]:
    """What could be read, or why not."""
    try:
        return read(), ""
    except UserError as fault:
        return None, str(fault)


def _missing(recipe: Recipe, boards: Mapping[TrainingFolder, Any], *faults: str) -> dict[str, tuple[str, str]]:
    """Section -> why it is empty, and the command that changes that, if the one does not name it."""
    files = {
        "probe": recipe.probe_folder / "report.json",
        "plan": recipe.plan_file,
        "figures": recipe.run / "report.json",
    }
    commands = {"probe": "ppcl probe RECIPE", "plan": "ppcl plan RECIPE", "figures": "ppcl evaluate RECIPE"}
    whys = {
        name: (fault, "") if files[name].exists() else ("Not there yet:", commands[name])
        for name, fault in zip(files, faults, strict=True)
        if fault
    }
    if not any(boards.values()):
        whys["training"] = ("Not trained yet:", "ppcl distill RECIPE")
    if not _folders(recipe):
        whys["folders"] = ("Not written yet:", "ppcl consolidate RECIPE")
    return whys


def _colours(recipe: Recipe, planned: plan.Section | None, models: Sequence[ModelFigures]) -> dict[str, int]:
    """Model -> its colour, the same in every figure; a fine-tuned variant has its variant's."""
    variants = list(planned.plan.variants) if planned else []
    variants += [
        name
        for name in dict.fromkeys(untuned(m.name) for m in models)
        if name not in variants and name != "teacher" and not name.endswith(UNDISTILLED)
    ]
    found = {name: number_ for number_, name in enumerate(variants)}
    return found | {model.name: found[untuned(model.name)] for model in models if untuned(model.name) in found}


def _fronts(models: Sequence[ModelFigures], colours: Mapping[str, int]) -> tuple[Markup, Markup]:
    """Error over parameters and over latency; the line joins models that none beats in both."""
    shown = [model for model in models if not model.name.endswith(UNDISTILLED)]
    drawn = []
    for label, sizes in (
        ("parameters, millions", [model.params / 1e6 for model in shown]),
        ("ms a forward", [model.latency_ms for model in shown]),
    ):
        points = [(size, model.sample_mse) for size, model in zip(sizes, shown, strict=True)]
        curves = [Curve("front", [points[place] for place in pareto(points)], COLOURS, faint=True)]
        curves += [
            Curve(model.name, [point], colours.get(model.name, COLOURS), dots=True, line=False, labels=[model.name])
            for model, point in zip(shown, points, strict=True)
        ]
        drawn.append(plot(curves, label, "sample MSE to the teacher"))
    return drawn[0], drawn[1]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points of which no other has both less of the one and less of the other, from left to right."""
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front


def _noise(models: Sequence[ModelFigures], colours: Mapping[str, int]) -> list[Markup]:
    """A plot for each error that is known by noise level."""
    shown = [model for model in models if model.name in colours]
    drawn = []
    for title in dict.fromkeys(title for model in shown for title in model.curves):
        curves = [
            Curve(m.name, m.curves[title], colours[m.name], dots=True, dashed=m.name != untuned(m.name))
            for m in shown
            if title in m.curves
        ]
        drawn.append(plot(curves, "place on the ladder of noise: 0 is pure noise", f"{title}, log scale", log=True))
    return drawn


def _folders(recipe: Recipe) -> list[tuple[str, str, float]]:
    """The models' folders: name, link, GB."""
    found = []
    for folder in sorted((recipe.run / "pruned").glob("*")):
        if (folder / recipe.teacher.component / "config.json").exists():
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            found.append((folder.name, f"pruned/{quote(folder.name)}/", size / 1e9))
    return found
