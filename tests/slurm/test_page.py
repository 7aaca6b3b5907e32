"""The report page in a real browser, which `make test-slurm` installs: no error, all images, full tables."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppcl_ds.evaluate.compared import ScoreFigures, SetFigures, Worst
from ppcl_ds.evaluate.figures import ModelFigures
from ppcl_ds.evaluate.paired import interval, paired
from ppcl_ds.evaluate.report import Curves, Figures, draw_samples, write_report
from ppcl_ds.evaluate.speed import Speed

pytestmark = pytest.mark.slurm

LOOK = """
<script>
addEventListener("load", () => {
  const images = [...document.images], wide = document.documentElement;
  const found = {
    images: images.length,
    loaded: images.filter(image => image.complete && image.naturalWidth > 0).length,
    empty: [...document.querySelectorAll("td")].filter(cell => !cell.textContent.trim()).length,
    rows: document.querySelectorAll("tr").length,
    beside: wide.scrollWidth - wide.clientWidth,
    fetched: performance.getEntriesByType("resource").filter(each => !each.name.startsWith("data:")).length,
  };
  document.title = JSON.stringify(found);
});
</script>
"""
PROMPTS = [f"a very_long_word_{'x' * 60} and <b>markup</b> & more, number {number}" for number in range(20)]


def page(run: Path) -> Path:
    """The report of a teacher and two variants on one prompt set."""
    random = np.random.default_rng(0)
    names = ("teacher", "large", "small", "small-undistilled")
    models = [
        ModelFigures(
            name=name,
            params=10**10 // (number + 1),
            block_params_ratio=1 / (number + 1),
            latency_ms=300 / (number + 1),
            velocity_mse=0.01 * number,
            sample_mse=0.02 * number,
            by_noise=[(place / 5, 0.01 * number * (1 + place)) for place in range(5)],
        )
        for number, name in enumerate(names)
    ]
    each = {name: list(random.normal(30 - number, 3, len(PROMPTS))) for number, name in enumerate(names[:3])}
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
    one = SetFigures(
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
    speed = [Speed(model="teacher", way="plain", size=64, batch=1, seconds=1.5).model_dump()]
    (run / "speed.json").write_text(json.dumps(speed))
    draw_samples({name: torch.zeros(4, 3, 8, 8) for name in names}, PROMPTS[:4], run / "samples.png")
    losses = {"blocks_00_01": [(1, 1.0), (2, 0.5)]}
    write_report(run, Figures(models=models, sets=[one], facts={"Teacher": "a/long/path" * 9}), Curves(losses, losses))
    return run / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole_in_a_browser(tmp_path: Path, width: int) -> None:
    path = page(tmp_path)
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
    assert found.pop("rows") == 5 + 4 + 3 + 2
    assert found == {"images": 2 * 16 + 4, "loaded": 2 * 16 + 4, "empty": 0, "beside": 0, "fetched": 0}
