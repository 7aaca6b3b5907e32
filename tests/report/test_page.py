"""The page of a whole run, read by a parser of its own: what it says is what the files say, at every stage."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from ppcl_ds.evaluate.compared import SetFigures
from ppcl_ds.recipe import Recipe, TrainingFolder
from ppcl_ds.record import open_any, read_record
from ppcl_ds.report.page import write_page
from ppcl_ds.report.probe import cheapest, in_words
from ppcl_ds.report.renew import renew
from ppcl_ds.report.training import smoothed
from ppcl_ds.report.verdict import newcombe, share_in_words
from ppcl_ds.units.plan import Plan
from tests.conftest import command
from tests.report.runs import LONGEST, STAGES, TEACHER, make_run, plan_of, probe_of

VOID = {"meta", "link", "br", "img", "input"}
OPEN_AT_WILL = {"tr", "td", "th", "html", "body", "head", "p", "li"}


class Read(HTMLParser):
    """A page as a browser without a script has it: text, tables, rectangles by section, addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.words: dict[str, str] = {}
        self.rects: list[tuple[str, dict[str, str]]] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str]] = []
        self.scripts = 0
        self._section, self._table, self._open = "", "", [""]
        self._silent = False
        self.feed(text)
        self.close()
        self.left = [tag for tag in self._open if tag and tag not in OPEN_AT_WILL]

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        own = {name: value or "" for name, value in given}
        assert not any(name.startswith("on") for name in own), own
        self.addresses += [own[name] for name in ("src", "href", "xlink:href", "action") if name in own]
        if tag == "section":
            self._section = own["id"]
        elif tag == "table":
            self._table = own.get("class", "")
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        elif tag == "table":
            self._table = ""
        elif tag == "rect":
            self.rects.append((self._section, own))
        elif tag == "img":
            self.images.append(own)
        self.scripts += tag == "script"
        self._silent = tag in ("script", "style")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, given)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        self._silent = False
        while self._open[-1] in OPEN_AT_WILL and self._open[-1] != tag:
            self._open.pop()
        assert self._open.pop() == tag, f"{tag} closes another"
        if tag == "table":
            self._table = ""

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        self.words[self._section] = self.words.get(self._section, "") + data
        if self._table and self.tables[self._table] and self.tables[self._table][-1]:
            self.tables[self._table][-1][-1] += data

    def said(self, section: str) -> str:
        return re.sub(r"\s+", " ", self.words.get(section, ""))

    def rows(self, table: str) -> list[list[str]]:
        return [[re.sub(r"\s+", " ", cell).strip() for cell in row] for row in self.tables[table]]


def read(recipe: Recipe) -> Read:
    page = Read(write_page(recipe).read_text())
    assert not page.left
    assert page.scripts == 1
    local = [each for each in page.addresses if not each.startswith(("data:", "#"))]
    assert all(each.startswith("pruned/") for each in local), local
    return page


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_at_every_stage_has_a_page(tmp_path: Path, stage: str) -> None:
    page = read(make_run(tmp_path / "run", stage=stage))
    reached = STAGES.index(stage)
    commands = {"probe": ("probe", 1), "plan": ("plan", 2), "training": ("distill", 3), "models": ("consolidate", 4)}
    for section, (name, needed) in (commands | {"verdict": ("evaluate", 5)}).items():
        assert (f"ppcl {name} RECIPE" in page.said(section)) == (reached < needed), section
    assert "0.0%" not in page.said("figures")


def test_a_run_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    recipe = make_run(tmp_path / "run", stage="nothing")
    recipe.run.rmdir()
    with pytest.raises(Exception, match=r"run is not there"):
        write_page(recipe)


def test_figures_are_those_of_the_files(tmp_path: Path) -> None:
    recipe = make_run(tmp_path / "run")
    page = read(recipe)
    models = json.loads((recipe.run / "report.json").read_text())["models"]
    header, *rows = page.rows("models")
    assert [row[0] for row in rows] == [model["name"] for model in models]
    for row, model in zip(rows, models, strict=True):
        shown = dict(zip(header, row, strict=True))
        assert int(shown["parameters"].replace(",", "")) == model["params"]
        assert float(shown["block parameters, %"]) == pytest.approx(100 * model["block_params_ratio"], abs=0.5)
        assert float(shown["ms a forward"]) == pytest.approx(model["latency_ms"], abs=0.05)
        assert float(shown["times faster"]) == pytest.approx(models[0]["latency_ms"] / model["latency_ms"], abs=0.005)
        assert float(shown["accuracy, %"]) == pytest.approx(100 * model["accuracy"], abs=0.05)
        assert float(shown["sample MSE"]) == pytest.approx(model["sample_mse"], abs=5e-5)
    said = page.said("verdict")
    assert (
        "large-finetuned: half of the block parameters, 2.0 times as fast (6.00 ms a forward, the teacher 12.0 ms)"
        in said
    )
    assert "no worse than the teacher in prompt accuracy within 2.0 points (99.0 %, the teacher 99.0 %" in said
    assert "small worse: a quarter of the block parameters, 4.0 times as fast" in said
    assert [row[2] for row in page.rows("folders")[1:]] == ["pruned/large/", "pruned/large-finetuned/", "pruned/small/"]


@pytest.mark.parametrize(
    ("teacher", "blocks", "said"),
    [("QwenImageTransformer2DModel", 60, True), ("QwenImageTransformer2DModel", 12, False), (TEACHER, 60, False)],
)
def test_the_papers_own_figures_stand_beside_official_ones(
    tmp_path: Path, teacher: str, blocks: int, said: bool
) -> None:
    """Of its own teacher alone, 60 blocks of Qwen-Image; the same class has other sizes."""
    own = SetFigures(
        name="dpg", layout="dpg", prompts=4, per_prompt=4, settings={"size": [64, 64]}, weights={}, scores=[], worst=[],
        official={"teacher": {"overall": 87.0}, "small": {"overall": 85.0}},
    )  # fmt: skip
    recipe = make_run(tmp_path, blocks, sets=[own])
    plan_of(blocks, teacher=teacher).save(recipe.plan_file)
    text = write_page(recipe).read_text()
    assert "-2.30 %" in text
    assert ("lose 0.4 % with 14 B parameters" in text) == said


def test_cost_is_what_was_logged(tmp_path: Path) -> None:
    recipe = make_run(tmp_path / "run")
    header, distilled, tuned, together = read(recipe).rows("cost")
    shown = dict(zip(header, distilled, strict=True))
    # 400 steps of 8 samples at 4 samples a second, 40 looks of half a second; two ranks, and one for the fine-tuning.
    assert (shown["command"], shown["steps"], shown["samples"], shown["teacher forwards"]) == (
        "distill", "400", "3,200", "3,200",
    )  # fmt: skip
    assert shown["time"] == f"{(400 * 8 / 4 + 20) / 60:.1f} min"
    assert float(shown["accelerator hours"]) == pytest.approx(2 * 820 / 3600, rel=0.01)
    assert tuned[:4] == ["finetune large", "100", "800", "800"]
    assert float(together[-2]) == pytest.approx(2 * 820 / 3600 + 100 / 3600, rel=0.01)


@pytest.mark.parametrize("blocks", [12, 60, 100])
def test_the_plan_is_a_map_of_every_block(tmp_path: Path, blocks: int) -> None:
    recipe = make_run(tmp_path / "run", blocks=blocks, stage="planned")
    plan = plan_of(blocks)
    page = read(recipe)
    cells = [given for section, given in page.rects if section == "plan" and given["class"] != "gone"]
    found = []
    for given in cells:
        left, width = (float(given[name].rstrip("%")) * blocks / 100 for name in ("x", "width"))
        assert width == pytest.approx(round(width), abs=0.01)
        found.append((given["class"], round(left), round(left) + round(width) - 1))
    expected = []
    for name in plan.variants:
        taken = {block for unit in plan.units_of(name) for block in range(unit.span[0], unit.span[1] + 1)}
        row = [("kept", block, block) for block in range(blocks) if block not in taken]
        row += [("unit" if unit.kind == "depth" else "narrowed", *unit.span) for unit in plan.units_of(name)]
        expected += sorted(row, key=lambda cell: cell[1])
    assert found == expected
    for name in plan.variants:
        assert f"{name}{len(plan.places(name))} blocks: " in page.said("plan").replace(f"{name} ", name)


def test_an_edited_plan_is_not_given_an_old_expectation(tmp_path: Path) -> None:
    recipe = make_run(tmp_path / "run", stage="planned")
    assert "probed error 0.0500" in read(recipe).said("plan")
    plan = plan_of(12)
    Plan(**plan.model_dump() | {"variants": {"small": ("middle",)}}).save(recipe.plan_file)
    page = read(recipe)
    assert "probed error" not in page.said("plan")
    assert "has not been said since it was last changed" in page.said("plan")


@pytest.mark.parametrize("name", ["plan.yaml", "probe/report.json", "report.json"])
def test_a_damaged_file_is_named_and_the_rest_is_there(tmp_path: Path, name: str) -> None:
    recipe = make_run(tmp_path / "run")
    (recipe.run / name).write_text("{")
    page = read(recipe)
    sections = {"plan.yaml": "plan", "probe/report.json": "probe", "report.json": "figures"}
    assert str(recipe.run / name) in page.said(sections[name])
    assert "step 400 of 400" in page.said("training")


def test_the_probe_says_what_is_cheap(tmp_path: Path) -> None:
    recipe = make_run(tmp_path / "run", blocks=60, stage="probed")
    page, report = read(recipe), probe_of(60)
    alone = [report.error[u][u + 1] or 0.0 for u in range(59)]
    assert f"Block {alone.index(max(alone)) + 1} is the dearest: {max(alone):.3f} by itself" in page.said("probe")
    assert "Blocks 36-56 are cheap: 15 of the 60 blocks can go there at a probed error of 0.186" in page.said("probe")
    bars = [given for section, given in page.rects if section == "probe" and given["class"].startswith("h")]
    heights = [float(given["height"].rstrip("%")) for given in bars[:59]]
    assert [height / heights[0] for height in heights] == pytest.approx(
        [v / alone[0] for v in alone], rel=0.02, abs=0.01
    )
    cells = re.search(
        r'<svg class="plot map"[^>]*aria-label="probed error"[^>]*>(.*?)</svg>',
        (recipe.run / "report.html").read_text(),
    )
    assert cells
    drawn = {(int(u), LONGEST - int(top)) for u, top in re.findall(r"M(\d+) (\d+)h1v1h-1z", cells[1])}
    assert drawn == {(u, v - u + 1) for u in range(60) for v in range(u + 1, min(60, u + LONGEST))}


def test_the_cheapest_spans_are_those_of_a_search_through_all() -> None:
    report = probe_of(7)
    spans = [(u, v) for u, row in enumerate(report.error) for v, value in enumerate(row) if value is not None]
    least: dict[int, float] = {}
    for count in range(1, 4):
        for chosen in combinations(spans, count):
            if all(a[1] < b[0] for a, b in pairwise(chosen)):
                gone = sum(v - u for u, v in chosen)
                least[gone] = min(least.get(gone, math.inf), sum(report.error[u][v] or 0 for u, v in chosen))
    found = cheapest(report.error)
    assert {cost.gone: cost.error for cost in found} == pytest.approx(least)
    for cost in found:
        assert sum(report.error[u][v] or 0 for u, v in cost.spans) == pytest.approx(cost.error)
        assert sum(v - u for u, v in cost.spans) == cost.gone


def test_spans_that_touch_are_named_as_one() -> None:
    assert in_words([(4, 6), (8, 9), (10, 11)]) == "4-6 and 8-11"
    assert in_words([(0, 1)]) == "0-1"
    assert in_words([(0, 1), (3, 4), (6, 8)]) == "0-1, 3-4 and 6-8"


def test_smoothing_keeps_ends_and_means() -> None:
    points = [(step, float(value)) for step, value in enumerate([0, 4] * 40)]
    smooth = smoothed(points)
    assert [step for step, _ in smooth] == [step for step, _ in points]
    assert smooth[0] == points[0]
    assert smooth[-1] == points[-1]
    assert all(1.7 < value < 2.3 for _, value in smooth[10:-10])
    assert smoothed([]) == []


def test_the_interval_of_two_shares_is_newcombes() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table II, method 10, for 9 of 10 less 3 of 10.
    value, low, high = newcombe(0.9, 0.3, 10)
    assert (value, low, high) == pytest.approx((0.6, 0.1705, 0.8090), abs=5e-5)
    assert newcombe(0.5, 0.5, 100).low == pytest.approx(-newcombe(0.5, 0.5, 100).high)


@pytest.mark.parametrize(
    ("share", "words"), [(0.5, "half"), (2 / 3, "two thirds"), (0.583, "58 %"), (0.745, "three quarters")]
)
def test_shares_are_said_as_people_say_them(share: float, words: str) -> None:
    assert share_in_words(share) == words


HOSTILE = '<img src=x onerror="alert(1)">&\'"</script>'


def test_names_stay_text(tmp_path: Path) -> None:
    tag = HOSTILE.replace("/", "|")
    recipe = make_run(tmp_path / "run", variants=(tag, "a b"), tag=tag, facts={"Teacher": HOSTILE})
    page = read(recipe)
    assert all(image["src"].startswith("data:image/") for image in page.images if "src" in image)
    assert tag in page.said("plan")
    assert f"late{tag}" in page.said("training")
    assert tag in page.said("pictures")
    assert HOSTILE in page.said("figures")


def test_a_command_renews_the_page_and_is_written_down(tmp_path: Path) -> None:
    recipe = make_run(tmp_path / "run", stage="probed")
    renew(recipe, "probe")
    page = Read((recipe.run / "report.html").read_text())
    [written] = read_record(recipe.run).commands
    assert (written.name, written.processes) == ("probe", 1)
    assert written.versions.keys() >= {"torch", "diffusers", "deepspeed"}
    row = page.rows("environment")[1]
    assert row[0] == "probe"
    assert f"torch {written.versions['torch']}" in row[-1]
    assert page.rows("cost")[1][0] == "probe"
    assert open_any(recipe.run) == recipe, "a run folder is enough from then on"
    with (recipe.run / "commands.jsonl").open("a") as file:
        file.write('{"command": ')  # a job that was killed as it wrote
    assert open_any(recipe.run) == recipe
    moved = recipe.run.rename(tmp_path / "elsewhere")
    assert open_any(moved).run == moved


def test_a_page_that_cannot_be_written_ends_no_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_run(tmp_path / "run", stage="probed")
    (recipe.run / "report.html" / "mine").mkdir(parents=True)
    renew(recipe, "probe")
    assert "report.html is not renewed" in capsys.readouterr().out
    assert {path.name for path in recipe.run.iterdir()} == {"probe", "report.html", "commands.jsonl"}


def test_the_command_takes_a_run_folder(tmp_path: Path) -> None:
    recipe = make_run(tmp_path / "run", stage="probed")
    renew(recipe, "probe")
    (recipe.run / "report.html").unlink()
    assert "report.html" in command("report", recipe.run)
    assert (recipe.run / "report.html").exists()
    assert "is not the folder of a run" in command("report", tmp_path, code=2)


def test_a_picture_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    recipe = make_run(tmp_path / "run")
    shown = sum(given.get("data-model") == "small" for given in read(recipe).images)
    (recipe.run / "samples" / "small" / "00.png").write_text("no picture")
    assert sum(given.get("data-model") == "small" for given in read(recipe).images) == shown - 1


def test_cost_is_counted_as_each_training_was_begun(tmp_path: Path) -> None:
    recipe = make_run(tmp_path / "run")
    before = read(recipe).rows("cost")
    for folder in TrainingFolder.all_of(recipe.run):
        folder.recipe.write_text(recipe.model_dump_json())
    larger = recipe.distill.model_copy(update={"micro_batch": 400})
    changed = recipe.model_copy(update={"distill": larger, "finetune": None})
    assert read(changed).rows("cost") == before
