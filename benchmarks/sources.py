"""What should units be trained on, and how often is a teacher forward worth using? With equal unit-steps.

    python -m benchmarks.sources [--json FILE] [--quick] [--testbed digits]

Real images; images that the teacher drew first; its own trajectories, with and without guidance; and both with every
forward used several times, from rings of several lengths. All train the same plan (-50 %) with the same number of
optimizer steps. Needs the testbed's teacher (`make demo`, `make showcase`); what is trained is not trained again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import typer
import yaml

from benchmarks.table import JsonFile, Quick, Row, row_of_pairs, show
from benchmarks.testbeds import TITLES, Judge, Library, Testbed, cell, folder_of, ppcl, write_recipe
from data_tools.encode import encode
from data_tools.shard import shard
from ppcl_ds.console import track
from ppcl_ds.data.stream import MicroBatchStream
from ppcl_ds.recipe import load_recipe
from ppcl_ds.teacher.pipeline_files import open_pipeline

GUIDANCE = 1.25
"""At which the demos draw."""

DRAWN_STEPS = 20
"""Of the images that are drawn first."""

VARIANT = "-50 %"


@dataclass(frozen=True)
class Source:
    """What a library is trained on.

    Attributes:
        distill: changes of the recipe's section.
        drawn: whether the images are the teacher's.
    """

    name: str
    distill: dict[str, Any]
    drawn: bool = False

    @property
    def forwards_a_step(self) -> float:
        """Of the teacher, for a step's samples."""
        guided = self.distill.get("trajectories", {}).get("guidance", [1, 1])[1] > 1
        return (1 + guided) / self.distill.get("replay", {}).get("uses", 1)


def _replayed(uses: int, ring: int, **more: Any) -> dict[str, Any]:
    return {"replay": {"uses": uses, "ring": ring}, **more}


GUIDED: dict[str, Any] = {"trajectories": {"guidance": [GUIDANCE, GUIDANCE]}}
REAL, CAPTIONS = "real images", "trajectories, guided"
SOURCES = (
    Source(REAL, {}),
    Source("images drawn first", {}, drawn=True),
    Source(CAPTIONS, GUIDED),
    Source("trajectories, without guidance", {"trajectories": {}}),
    *(Source(f"{REAL}, {uses} uses, ring {ring}", _replayed(uses, ring)) for uses, ring in ((4, 8), (8, 32))),
    *(
        Source(f"{CAPTIONS}, {uses} uses, ring {ring}", _replayed(uses, ring, **GUIDED))
        for uses, ring in ((2, 8), (4, 8), (4, 32), (8, 32))
    ),
)


def train(folder: Path, source: Source, seed: int, steps: int, testbed: str) -> Path:
    """Train a library; returns its recipe. How long it took lies beside it, in `seconds.json`."""
    run = folder / f"{source.name.replace(' ', '_').replace(',', '')}-{seed}"
    path = write_recipe(run, seed, steps, testbed)
    recipe = yaml.safe_load(path.read_text())
    recipe["plan"]["variants"] = {VARIANT: 0.5}
    recipe["distill"] |= source.distill
    if source.drawn:
        recipe["data"]["shards"] = str(folder / "drawn" / "shards")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    if not (run / "seconds.json").exists():
        ppcl("plan", path)
        began = time.monotonic()
        ppcl("distill", path)
        (run / "seconds.json").write_text(json.dumps(time.monotonic() - began))
    return path


def draw_first(folder: Path, testbed: str) -> None:
    """Have the teacher draw a picture for every training caption of the demo, and encode these."""
    path = write_recipe(folder / "drawn", 0, 1, testbed)
    raw = yaml.safe_load(path.read_text())
    raw["data"] |= {"source": str(folder / "drawn" / "images"), "shards": str(folder / "drawn" / "shards")}
    captions = [sample.caption for sample in _samples(path)]
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    recipe = load_recipe(path)
    images = Path(recipe.data.sources[0])
    if (recipe.data.shards / "encoded" / "index.json").exists():
        return
    images.mkdir(parents=True, exist_ok=True)
    names = ["text_encoder", "transformer", "vae"]
    pipe = open_pipeline(recipe.teacher.path, names, "cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(captions), 200):
        some = captions[start : start + 200]
        drawn = pipe(some, num_inference_steps=DRAWN_STEPS, true_cfg_scale=GUIDANCE, generator=generator).images
        for number, (caption, image) in enumerate(zip(some, drawn, strict=True), start):
            image.save(images / f"{number:04d}.png")
            (images / f"{number:04d}.txt").write_text(caption)
    shard(recipe.data)
    encode(recipe)


def _samples(path: Path) -> list[Any]:
    recipe = load_recipe(path)
    stream = MicroBatchStream(recipe.data, "train", 1, 0, recipe.bad_samples)
    return [stream.sample(0, number) for number in range(len(stream))]


def measured(path: Path, judge: Judge) -> dict[str, float]:
    """All figures of a run, from its folder if they were taken before."""
    file = path.with_name("figures.json")
    if not file.exists():
        library = Library(path)
        figures = judge.of(library.model(library.plan.variants[VARIANT]))
        found = {name: float(getattr(figures, name)) for name in TITLES}
        file.write_text(json.dumps(found, indent=1))
    return dict(json.loads(file.read_text())) | {"seconds": json.loads(path.with_name("seconds.json").read_text())}


def _rows(found: dict[str, list[dict[str, float]]]) -> list[Row]:
    rows = []
    for name in found:
        if name != REAL:
            for column in ("frechet", "accuracy"):
                ours, other = ([each[column] for each in found[which]] for which in (name, REAL))
                spread = f"; spread of {REAL} {stdev(other):.2g}" if len(other) > 1 else ""
                rows.append(row_of_pairs(f"{name} / {REAL}", ours, other, column, f"{column}{spread}"))
    return rows


def print_figures(found: dict[str, list[dict[str, float]]], sources: Sequence[Source], steps: int) -> None:
    """Mean and spread over seeds, a row each source, as Markdown."""
    print(f"| trained on | {' | '.join(TITLES.values())} | teacher forwards | seconds |\n|{'---|' * (len(TITLES) + 3)}")
    for source in sources:
        each = found[source.name]
        cells = [cell([own[column] for own in each]) for column in TITLES]
        forwards = round(steps * source.forwards_a_step)
        seconds = mean(own["seconds"] for own in each)
        print(f"| {source.name} | {' | '.join(cells)} | {forwards} | {seconds:.0f} |")


def main(json_file: JsonFile = None, quick: Quick = False, testbed: Testbed = "digits") -> None:
    """Print the figures of every source, and Fréchet distance and accuracy over those of real images."""
    folder = folder_of("sources", testbed, quick)
    seeds, steps = (1, 20) if quick else (3, 600)
    sources = (SOURCES[0], SOURCES[2], SOURCES[-2]) if quick else SOURCES
    if any(source.drawn for source in sources):
        draw_first(folder, testbed)
    first = write_recipe(folder / "teacher", 0, 1, testbed)
    judge = Judge(load_recipe(first), quick)
    found: dict[str, list[dict[str, float]]] = {}
    jobs = [(source, seed) for seed in range(seeds) for source in sources]
    for source, seed in track(jobs, "train and judge libraries", len(jobs)):
        path = train(folder, source, seed, steps, testbed)
        found.setdefault(source.name, []).append(measured(path, judge))
    print_figures(found, sources, steps)
    show("Trained on something else, over real images", _rows(found), json_file)


if __name__ == "__main__":
    typer.run(main)
