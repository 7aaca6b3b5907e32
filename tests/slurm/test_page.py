"""The page of a run in a real browser, which `make test-slurm` installs: all images, full tables, no error."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ppcl_ds.evaluate.compared import ScoreFigures, SetFigures, Worst
from ppcl_ds.evaluate.paired import interval, paired
from ppcl_ds.evaluate.speed import Speed
from ppcl_ds.record import write_down
from ppcl_ds.report.page import write_page
from tests.report.runs import make_run

pytestmark = pytest.mark.slurm

LOOK = """
<script>
// Numbers of one row of blocks, or of one axis, that are written over each other.
const overlapping = () => [...document.querySelectorAll("svg.plot")].filter(plot => {
  const texts = [...plot.querySelectorAll("text.tick")];
  const boxes = texts.map(text => text.getBoundingClientRect()).filter(box => box.width);
  const beside = (a, b) => a.right <= b.left || b.right <= a.left;
  const above = (a, b) => a.bottom - 2 <= b.top || b.bottom - 2 <= a.top;
  return boxes.some((a, n) => boxes.some((b, m) => n < m && !beside(a, b) && !above(a, b)));
}).map(plot => plot.getAttribute("aria-label"));
addEventListener("load", () => {
  const images = [...document.images], wide = document.documentElement;
  const found = {
    images: images.length,
    loaded: images.filter(image => image.complete && image.naturalWidth > 0).length,
    empty: [...document.querySelectorAll("tr:not(:last-child) td")].filter(cell => !cell.textContent.trim()).length,
    stage: !document.querySelector(".stage").hidden,
    over: overlapping(),
    beside: wide.scrollWidth - wide.clientWidth,
    fetched: performance.getEntriesByType("resource").filter(each => !each.name.startsWith("data:")).length,
  };
  document.title = JSON.stringify(found);
});
</script>
"""
PROMPTS = [f"a very_long_word_{'x' * 60} and <b>markup</b> & more, number {number}" for number in range(20)]
VARIANTS = ("large", "small")


def prompt_set(run: Path) -> SetFigures:
    """Scores, differences and worst pairs of a teacher and two variants."""
    random, names = np.random.default_rng(0), ("teacher", *VARIANTS)
    each = {name: list(random.normal(30 - number, 3, len(PROMPTS))) for number, name in enumerate(names)}
    clip = ScoreFigures(
        score="clip",
        kind="alone",
        more=True,
        values={name: float(np.mean(values)) for name, values in each.items()},
        differences={name: paired(each["teacher"], each[name]) for name in names[1:3]},
        intervals={name: interval(values) for name, values in each.items()},
    )
    worst = []
    for number, prompt in enumerate(PROMPTS[:16]):
        for name in ("teacher", "small"):
            path = run / "evaluate" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        shown = {name: f"evaluate/{name}/{number}.png" for name in ("teacher", "small")}
        worst.append(Worst(prompt=prompt, variant="small", by="clip", value=-1.0 / (1 + number), images=shown))
    return SetFigures(
        name="mine",
        layout="folder",
        prompts=len(PROMPTS),
        per_prompt=1,
        settings={"size": [64, 64], "steps": 4},
        weights={},
        scores=[clip],
        worst=worst,
        official={"teacher": {"overall": 87.0, "colors": 90.0}, "small": {"overall": 85.5, "colors": 91.0}},
    )


def page(run: Path, blocks: int, pixels: int) -> Path:
    """A finished run with a prompt set, timed, under names that are no markup."""
    figures: dict[str, Any] = {"sets": [prompt_set(run)], "facts": {"Teacher": "a/long/path" * 9}}
    recipe = make_run(run, blocks, variants=VARIANTS, tag="_<b>&" + "y" * 40, pixels=pixels, **figures)
    speed = [Speed(model="teacher", way="plain", size=64, batch=1, seconds=1.5).model_dump()]
    (run / "speed.json").write_text(json.dumps(speed))
    write_down(recipe, "evaluate")
    return write_page(recipe)


@pytest.mark.parametrize(("blocks", "pixels"), [(12, 8), (60, 128), (100, 8)])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole_in_a_browser(tmp_path: Path, width: int, blocks: int, pixels: int) -> None:
    path = page(tmp_path, blocks, pixels)
    path.write_text(path.read_text() + LOOK)
    browser = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    done = subprocess.run(
        [*browser, f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[:1000]
    found = json.loads(title[1])
    images = 2 * 16 + 4 * 5 + 1 + 2  # pairs; prompts by models; samples.png; the stage, which the script fills
    assert found == {
        "images": images,
        "loaded": images,
        "empty": 0,
        "beside": 0,
        "fetched": 0,
        "stage": True,
        "over": [],
    }
