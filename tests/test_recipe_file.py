"""Promises about recipes that build on others, changes on the command line, and what `ppcl recipe` prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import data_tools.cli
import ppcl_ds.cli
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe, load_recipe, open_run
from ppcl_ds.recipe_file import as_one_file
from ppcl_ds.start.view import schema
from tests.test_recipe import TEXT

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(TEXT)
    return path


def fault(path: Path, *changes: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, changes)
    return str(caught.value)


def test_changes_count_more_than_the_file(recipe: Path) -> None:
    changes = [
        "distill.steps=10",
        "distill.optimizer.lr=3e-4",
        "data.sizes={64x64: 2}",
        "run=runs/b",
        "seed=1",
        "seed=2",
    ]
    loaded = load_recipe(recipe, changes)
    assert (loaded.distill.steps, loaded.distill.optimizer.lr, loaded.seed) == (10, 3e-4, 2)
    assert loaded.data.sizes == {"64x64": 2}
    assert loaded.data.shards == Path("runs/b/shards")  # {run} is the changed one
    assert load_recipe(recipe, ["plan.variants={tiny: 0.7}"]).plan.variants == {"tiny": 0.7}  # all of it
    assert load_recipe(recipe, ["plan.variants.tiny=0.7"]).plan.variants == {"small": 0.5, "tiny": 0.7}
    told = ["finetune={steps: 5, micro_batch: 1, micro_batches_per_step: 1}", "finetune.steps=6"]
    assert load_recipe(recipe, told).tuning.steps == 6
    assert load_recipe(recipe, [*told, "finetune=null"]).finetune is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distil.steps=3", "own.yaml: unknown key 'distil' (--set); did you mean 'distill'?"),
        ("distill.step=3", "unknown key 'distill.step' (--set); did you mean 'steps'?"),
        ("distill.steps=many", "distill.steps must be a whole number, not 'many' (--set)"),
        ("distill.steps", "--set distill.steps: give KEY=VALUE, such as distill.steps=10"),
        ("distill..steps=3", "--set distill..steps=3: give KEY=VALUE"),
        ("data.source={run}/x", "--set data.source={run}/x: the value is no YAML; a text may need quotes"),
        ("run.folder=x", "--set run.folder=x: run is no section; set all of it"),
    ],
)
def test_a_change_that_makes_no_sense_is_one_line(recipe: Path, change: str, message: str) -> None:
    assert message in fault(recipe, change)


def test_a_run_folder_has_its_own_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--set seed=1: .* has its own recipe"):
        open_run(tmp_path, ["seed=1"])


def test_bases_are_merged_from_the_folder_of_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "ground.yaml").write_text(TEXT)
    (tmp_path / "bases" / "middle.yaml").write_text(
        "base: ground.yaml\nplan: {variants: {large: 0.2}, candidates: [ppcl, uniform]}\n"
        "distill: {steps: 8, micro_batch: 4}\n"
    )
    top = tmp_path / "top.yaml"
    top.write_text("base: bases/middle.yaml\nrun: runs/top\nplan: {candidates: [random]}\ndistill: {steps: 9}\n")
    monkeypatch.chdir("/")
    loaded = load_recipe(top)
    assert (loaded.distill.steps, loaded.distill.micro_batch, loaded.distill.micro_batches_per_step) == (9, 4, 1)
    assert loaded.plan.variants == {"small": 0.5, "large": 0.2}
    assert loaded.plan.candidates == ("random",)  # a list is replaced
    assert loaded.data.shards == Path("runs/top/shards")
    assert load_recipe(top, ["distill.steps=1"]).distill.steps == 1


def test_faults_of_bases_name_their_file_and_line(tmp_path: Path, recipe: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("base: own.yaml\ndistill: {steps: 9}\n")
    recipe.write_text(TEXT.replace("micro_batch: 2", "micro_batch: two"))
    assert f"distill.micro_batch must be a whole number, not 'two' (line 13 of {recipe})" in fault(top)
    top.write_text("base: gone.yaml\n")
    assert f"gone.yaml: no such file or folder, which {top} names as its base" in fault(top)
    top.write_text("\nbase: [own.yaml]\n")
    assert "line 2: base must be the path of another recipe, not ['own.yaml']" in fault(top)
    top.write_text("base: own.yaml\n")
    recipe.write_text(TEXT + "base: ./top.yaml\n")
    assert "base: ./top.yaml builds on this file itself" in fault(top)
    assert "base: own.yaml builds on this file itself" in fault(recipe)


def test_one_file_says_the_same_by_itself(tmp_path: Path, recipe: Path) -> None:
    top, alone = tmp_path / "top.yaml", tmp_path / "far" / "alone.yaml"
    top.write_text("base: own.yaml\nseed: 3\n")
    alone.parent.mkdir()
    alone.write_text(as_one_file(top, ["distill.steps=10"]))
    assert load_recipe(alone) == load_recipe(top, ["distill.steps=10"])
    assert as_one_file(recipe) == TEXT  # comments and all


def ppcl(*arguments: str | Path, app: Any = ppcl_ds.cli.app) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_what_is_shown_is_the_recipe_with_its_origins(tmp_path: Path, recipe: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("base: own.yaml\nseed: 3\n")
    shown = ppcl("recipe", "show", top, "--set", "distill.steps=10")
    assert Recipe.model_validate(yaml.safe_load(shown)) == load_recipe(top, ["distill.steps=10"])
    marks = {line.split("#")[0].strip(): line.partition("# ")[2] for line in shown.splitlines()[1:]}
    assert marks["seed: 3"] == ""
    assert marks["steps: 10"] == "--set"
    assert marks["micro_batch: 2"] == marks["small: 0.5"] == "own.yaml"
    assert marks["magnitude_weight: 1.0"] == marks["weight_decay: 0.02"] == "default"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_shown_and_in_the_schema(path: Path) -> None:
    assert Recipe.model_validate(yaml.safe_load(ppcl("recipe", "show", path))) == load_recipe(path)
    found = schema()

    def look(value: Any, kind: dict[str, Any], place: str) -> None:
        options = [
            found["$defs"][each["$ref"].split("/")[-1]] for each in (kind, *kind.get("anyOf", ())) if "$ref" in each
        ]
        for section in options if isinstance(value, dict) else ():
            for key, below in value.items():
                assert key in section["properties"], place + key
                look(below, section["properties"][key], f"{place}{key}.")

    found["$defs"]["Recipe"] = {key: found[key] for key in ("properties",)}
    look(yaml.safe_load(path.read_text()), {"$ref": "#/$defs/Recipe"}, "")


def test_the_schema_says_of_keys_what_their_source_says() -> None:
    found = schema()
    assert found["$defs"]["Distill"]["properties"]["steps"]["description"] == "Optimizer steps."  # of its base class
    assert "base" in found["properties"]
    assert found["additionalProperties"] is False
    assert schema()["properties"]["run"]["description"].startswith("Folder of this run")


@pytest.mark.parametrize(
    ("app", "arguments"),
    [(ppcl_ds.cli.app, []), (ppcl_ds.cli.app, ["lora"]), (ppcl_ds.cli.app, ["recipe"]), (data_tools.cli.app, [])],
)
def test_a_bare_command_is_help(app: Any, arguments: list[str]) -> None:
    assert "Usage" in ppcl(*arguments, app=app)


def test_both_commands_know_their_version() -> None:
    assert ppcl("--version").startswith("ppcl-ds ")
    assert ppcl("--version", app=data_tools.cli.app) == ppcl("--version")


def test_a_shell_completes_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        code = "import sys; sys.argv = ['ppcl']; from ppcl_ds.cli import main; main()"
        asked = {"_PPCL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert completed("ppcl dist") == ["distill"]
    assert completed("ppcl distill --un") == ["--until"]
