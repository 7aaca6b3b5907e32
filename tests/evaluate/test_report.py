"""The report of a run with prompt sets: numbers in report.json, a page that needs nothing beside itself, the cards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ppcl_ds.evaluate.compared import SetFigures
from ppcl_ds.evaluate.evaluate import _with_official
from ppcl_ds.export.consolidate import Form, consolidate
from ppcl_ds.recipe import load_recipe
from ppcl_ds.report.page import pareto
from tests.conftest import command
from tests.export.trained import pretend_trained

PROMPTS = ["a tiny two", "one", "three"]


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """A score: more than 0."""
    return [float(np.asarray(image).mean()) + 1 for image in images]


@pytest.fixture
def evaluated(new_run: Callable[..., Path]) -> Path:
    """A recipe whose two variants, one prompt set and one score are evaluated."""
    path = new_run("qwen")
    rows = [{"tag": "one" if n else "two", "prompt": text} for n, text in enumerate(PROMPTS)]
    (path.parent / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load(path.read_text())
    one = {"name": "words", "prompts": str(path.parent / "metadata.jsonl"), "layout": "geneval", "per_prompt": 2}
    score = {"score": f"{__name__}:brightness", "margin": 1000.0}
    small = {"steps": 1, "samples": 2, "batch_size": 2, "velocity_batches": 1}
    recipe["evaluate"] = small | {"sets": [one], "scores": [score]}
    path.write_text(yaml.safe_dump(recipe))
    consolidate(pretend_trained(path, "qwen"), ["small", "medium"], Form())
    command("evaluate", path)
    return path


class Page(HTMLParser):
    """What a page shows, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        addresses = [str(value) for name, value in attributes if name in ("src", "href")]
        self.sources += [each for each in addresses if not each.startswith(("#", "pruned/"))]


def test_report_page_and_cards_say_the_same(evaluated: Path) -> None:
    run = load_recipe(evaluated).run
    report = json.loads((run / "report.json").read_text())
    [words] = report["sets"]
    own, near = words["scores"]
    assert (own["score"], near["score"]) == (f"{__name__}:brightness", "psnr")
    images = {model: sorted((run / "evaluate/words/images" / model).rglob("*.png")) for model in own["values"]}
    assert images.keys() == {"teacher", "small", "medium"}
    each = {m: [np.asarray(Image.open(p), dtype=float).mean() + 1 for p in paths] for m, paths in images.items()}
    for model, values in each.items():
        assert own["values"][model] == pytest.approx(np.mean(values))
    for variant in ("small", "medium"):
        pairs = np.subtract(each[variant], each["teacher"]).reshape(-1, 2).mean(axis=1)
        found = own["differences"][variant]
        assert found["mean"] == pytest.approx(pairs.mean())
        assert found["low"] <= found["mean"] <= found["high"]
        assert (found["verdict"], found["margin"]) == ("no worse", 1000.0)
        worst = [worst for worst in words["worst"] if worst["variant"] == variant]
        assert [PROMPTS.index(each["prompt"]) for each in worst] == np.argsort(pairs).tolist()
    assert all(len(row["by_noise"]) for row in report["models"])

    page = Page((run / "report.html").read_text())
    assert page.sources
    assert all(source.startswith("data:") for source in page.sources)
    pairs, held_out, before = 2 * 2 * len(PROMPTS), 2 * 3, 2 * 2
    assert sum(source.startswith("data:image/") for source in page.sources) == pairs + held_out + before + 1
    assert f"{own['values']['small']:.4g}" in page.words
    assert "no worse by 1,000" in page.words
    assert not re.search(
        r"https?://(?!www\.w3\.org)", (run / "report.html").read_text().replace("https://arxiv.org", "")
    )
    card = (run / "pruned" / "small" / "README.md").read_text()
    assert "### words\n" in card
    assert f"- small, psnr: {near['values']['small']:.4g}\n" in card
    assert f"- small, {__name__}:brightness: {own['values']['small']:.4g}, no worse than the teacher by 1e+03\n" in card


def test_official_scores_stand_beside_each_other(evaluated: Path, tmp_path: Path) -> None:
    run = load_recipe(evaluated).run
    arguments: list[str] = []
    for model, right in (("teacher", 4), ("small", 3)):
        rows: list[dict[str, Any]] = [{"tag": "one", "correct": n < right} for n in range(5)]
        path = tmp_path / f"{model}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments += ["--read-scores", f"words/{model}={path}"]
    assert "words, small: overall 60, one 60" in command("evaluate", evaluated, *arguments)
    page = Page((run / "report.html").read_text())
    assert {"80", "60", "-25.00 %"} <= set(page.words)
    assert "- small, the benchmark's own overall: 60\n" in (run / "pruned" / "small" / "README.md").read_text()
    command("evaluate", evaluated)  # again: what was read stays, as the images are the same
    assert json.loads((run / "report.json").read_text())["sets"][0]["official"]["small"]["overall"] == 60
    assert "no model 'smal' was evaluated" in command(
        "evaluate", evaluated, "--read-scores", f"words/smal={tmp_path / 'small.jsonl'}", code=2
    )


def test_what_was_said_of_other_images_is_forgotten() -> None:
    own: dict[str, Any] = {"name": "a", "layout": "dpg", "prompts": 1, "per_prompt": 4, "scores": [], "worst": []}
    weights, said = {"teacher": "1", "small": "2"}, {"teacher": {"overall": 9.0}, "small": {"overall": 8.0}}
    before = SetFigures(**own, settings={"steps": 4, "versions": "old"}, weights=weights, official=said)
    again = SetFigures(**own, settings={"steps": 4, "versions": "new"}, weights=weights)
    assert _with_official([again], [before])[0].official == said
    trained = again.model_copy(update={"weights": weights | {"small": "3"}})
    assert _with_official([trained], [before])[0].official == {"teacher": {"overall": 9.0}}
    longer = again.model_copy(update={"settings": {"steps": 8}})
    assert _with_official([longer], [before])[0].official == {}


def test_the_front_is_what_nothing_beats() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 2.0), (2.5, 3.0), (2.0, 4.0), (4.0, 1.0)]
    beaten = {n for n, (x, y) in enumerate(points) if any((a, b) != (x, y) and a <= x and b <= y for a, b in points)}
    assert pareto(points) == [n for n in (1, 2, 0) if n not in beaten]
    assert set(pareto(points)) | beaten == set(range(len(points)))
