"""`ppcl demo`, shortened: every step runs as a public command, leaves what the README names, and is not repeated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppcl_ds.shipped import shipped
from ppcl_ds.watch.tensorboard import read_scalars
from tests.conftest import command

FILES = [
    "plan.yaml",
    "probe/report.json",
    "probe/heatmap.png",
    "teacher/model_index.json",
    "teacher/transformer/config.json",
    "samples.png",
    "report.json",
    "report.html",
    "pruned/large/transformer/config.json",
    "pruned/medium/transformer/config.json",
    "pruned/medium-finetuned/transformer/config.json",
    "pruned/small/transformer/config.json",
]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The recipe file of a finished short demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    recipe = yaml.safe_load(shipped("recipes/digits.yaml").read_text())
    recipe["run"] = str(folder / "run")
    recipe["demo"]["steps"] = 20
    recipe["distill"] |= {"steps": 6, "log_every": 2, "sample_every": 3, "checkpoint_every": 3, "micro_batch": 8}
    recipe["finetune"] |= {"steps": 4, "log_every": 2, "sample_every": 2, "checkpoint_every": 2, "micro_batch": 8}
    recipe["probe"] = {"batch_size": 16, "batches": 2}
    recipe["evaluate"] |= {"samples": 32, "batch_size": 32, "steps": 4, "velocity_batches": 1}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path, command("demo", path)


def test_the_demo_leaves_everything_it_promises(short: tuple[Path, str]) -> None:
    run = short[0].parent / "run"
    for name in FILES:
        assert (run / name).stat().st_size > 0, name
    models = {row["name"]: row for row in json.loads((run / "report.json").read_text())["models"]}
    variants = {f"{variant}{ending}" for variant in ("large", "medium", "small") for ending in ("", "-undistilled")}
    assert set(models) == {"teacher", "medium-finetuned"} | variants
    keys = {"name", "params", "block_params_ratio", "latency_ms", "accuracy", "frechet", "velocity_mse", "sample_mse"}
    keys |= {"images", "by_noise", "guided_mse", "branch_mse", "short_mse", "guided_by_noise", "branch_by_noise"}
    for name, row in models.items():
        weights = row.pop("weights")
        assert (weights is None) == (name == "teacher" or name.endswith("-undistilled")), (
            "of folders that were measured"
        )
        assert row.keys() == keys
        assert None not in row.values()
    for variant, share in (("large", 0.33), ("medium", 0.5), ("small", 0.75)):
        assert models[variant]["block_params_ratio"] == pytest.approx(1 - share, abs=0.05)
        assert 0 < models[variant]["velocity_mse"] < models[f"{variant}-undistilled"]["velocity_mse"]
    errors = ("velocity_mse", "guided_mse", "branch_mse", "short_mse", "sample_mse")
    assert [models["teacher"][error] for error in errors] == [0] * 5
    assert Image.open(run / "samples.png").size[0] > 1000


def test_tensorboard_has_what_a_run_is_watched_by(short: tuple[Path, str]) -> None:
    scalars = read_scalars(short[0].parent / "run" / "distill" / "tensorboard")
    parts = {name.split("/")[0] for name in scalars}
    assert {"run", "memory_gib", "heldout"} <= parts
    assert {"run/learning_rate", "run/samples_per_second", "run/loss"} <= scalars.keys()
    units = [part for part in parts if part.startswith("blocks_")]
    assert len(units) > 3
    for unit in units:
        assert [step for step, _ in scalars[f"{unit}/loss/image"]] == [2, 4, 6]
        assert [step for step, _ in scalars[f"{unit}/norm_ratio/image"]] == [2, 4, 6]
    assert [step for step, _ in scalars["heldout/velocity_mse/medium"]] == [3, 6]
    events = EventAccumulator(str(short[0].parent / "run" / "distill" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {f"samples/{name}" for name in ("teacher", "large", "medium", "small")}


def test_the_report_page_needs_no_other_file(short: tuple[Path, str]) -> None:
    page = (short[0].parent / "run" / "report.html").read_text()
    # Eight prompts by the teacher and seven variants, of which three were not trained; and samples.png.
    assert page.count('src="data:image/png;base64,') == 8 * 8 + 1
    assert "src=" not in page.replace('src="data:', "")
    assert all(command in page for command in ("<td>probe", "<td>distill", "<td>finetune medium", "<td>evaluate"))
    assert "Not there yet" not in page


def test_a_second_demo_repeats_nothing(short: tuple[Path, str]) -> None:
    printed = command("demo", short[0])
    assert printed.count("(done before)") == 10
    assert "distill:" not in printed


def test_a_lost_result_is_made_again_with_all_that_follows(short: tuple[Path, str]) -> None:
    run = short[0].parent / "run"
    shutil.rmtree(run / "pruned" / "small")
    printed = command("demo", short[0])
    assert printed.count("(done before)") == 8
    assert (run / "pruned" / "small" / "transformer" / "config.json").exists()


def test_another_recipe_does_not_mix_with_an_old_run(short: tuple[Path, str]) -> None:
    path = short[0].with_name("other.yaml")
    path.write_text(short[0].read_text() + "\n# changed\n")
    assert "--fresh" in command("demo", path, code=2)
