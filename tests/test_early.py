"""What a command knows before it imports torch: names, what is done already; and its first sign of life."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppcl_ds import early
from ppcl_ds.export import cli as export_cli
from ppcl_ds.export.consolidate import FORMATS
from ppcl_ds.export.gguf_file import TYPES
from ppcl_ds.export.lora import STRATEGIES
from ppcl_ds.export.quantise import PACKAGES
from ppcl_ds.export.single_files import TOOLS
from ppcl_ds.recipe import Recipe, checkpoint_tag, load_recipe
from ppcl_ds.reporting import read_report
from tests.test_recipe import TEXT

TUNED = "finetune: {steps: 2, micro_batch: 2, micro_batches_per_step: 1}\n"
PLAN = "teacher: T\nblocks: 6\nunits: [{name: a, span: [1, 2], streams: [image, text]}]\nvariants: {small: [a]}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe with a teacher's folder that holds a configuration, and a plan."""
    path = tmp_path / "r.yaml"
    run, teacher = tmp_path / "run", tmp_path / "teacher"
    text = TEXT.replace("run: runs/a", f"run: {run}").replace("models/teacher", str(teacher))
    path.write_text(text + TUNED)
    (teacher / "transformer").mkdir(parents=True)
    (teacher / "transformer" / "config.json").write_text("{}")
    run.mkdir()
    (run / "plan.yaml").write_text(PLAN)
    return path


def without_torch(*arguments: str | Path, code: int, program: str = "ppcl_ds.cli") -> str:
    """`ppcl ARGUMENTS`, in which an import of torch or diffusers fails."""
    text = f"import sys\nsys.modules['torch'] = sys.modules['diffusers'] = None\nfrom {program} import main\nmain()"
    done = subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["consolidate", "R", "--variant", "smal"], "variant 'smal' is not in the plan; it has: small"),
        (["consolidate", "R", "--dtype", "fp31"], "--dtype: 'fp31' is not one of fp32, bf16, fp16"),
        (["finetune", "R", "--variant", "smal"], "variant 'smal' is not in the plan; it has: small"),
        (["estimate", "R", "--variant", "smal"], "variant 'smal' is not in the plan; it has: small"),
        (["estimate", "R", "--accelerator", "h10"], "--accelerator h10: not in the table; did you mean 'h100'?"),
        (["distill", "R", "--set", "wandb.project=x", "--set", "teacher.path=/none"], "teacher /none: no such file or"),
        (["probe", "R", "--part", "1/2", "--merge"], "--part and --merge: give one of them"),
        (["probe", "R", "--set", "teacher.path=gone"], "teacher gone: no such file or folder, seen from "),
        (["sample", "gone", "--prompt", "x"], "model gone: no such file or folder, seen from "),
        (["lora", "remap", "gone.safetensors", "--plan", "P", "--variant", "small"], "there is no such file"),
        (
            ["lora", "remap", "L", "--plan", "P", "--variant", "smal"],
            "variant 'smal' is not in the plan; it has: small",
        ),
        (["lora", "remap", "L", "--plan", "P", "--variant", "small", "--strategy", "far"], "--strategy: 'far' is not"),
        (["import", "L", "--out", "x"], "a single file needs --base"),
    ],
)
def test_slips_are_told_without_torch(path: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    lora = tmp_path / "l.safetensors"
    lora.touch()
    places = {"R": str(path), "P": str(tmp_path / "run" / "plan.yaml"), "L": str(lora)}
    assert message in without_torch(*(places.get(word, word) for word in arguments), code=2)


def finished(recipe: Recipe) -> None:
    folder = recipe.distillation
    (folder.checkpoints / checkpoint_tag(4)).mkdir(parents=True)
    (folder.checkpoints / "latest").write_text(checkpoint_tag(4))
    held: dict[str, Any] = {unit["name"]: {} for unit in yaml.safe_load(PLAN)["units"]}
    (folder.checkpoints / checkpoint_tag(4) / "checkpoint.json").write_text(json.dumps({"units": held}))
    shutil.copy(recipe.plan_file, folder.plan)
    folder.recipe.write_text(recipe.model_dump_json())


def test_a_training_that_is_done_says_so_without_torch(path: Path) -> None:
    recipe = load_recipe(path)
    finished(recipe)
    said = without_torch("distill", path, "--set", "evaluate.samples=3", code=0)
    assert f"distill: 4 of 4 steps are done, in {recipe.distillation.checkpoints}/step-000004" in said
    assert f"next: ppcl consolidate {path} --set evaluate.samples=3" in said
    report = read_report(recipe.distillation.progress)
    assert (report.state, report.step, report.total) == ("done", 4, 4)


@pytest.mark.parametrize("change", ["distill.steps=5", "distill.optimizer.lr=0.5", "seed=3"])
def test_a_training_that_may_not_be_done_is_looked_at(path: Path, change: str) -> None:
    recipe = load_recipe(path)
    finished(recipe)
    changed = load_recipe(path, [change])
    assert not early.is_finished(changed, changed.distillation, changed.distill.steps, "")


def test_a_plan_of_units_that_are_trained_is_done_and_another_one_looked_at(path: Path) -> None:
    """As after `ppcl plan --from-run`, which drops units, and after a plan that had them was restored."""
    recipe = load_recipe(path)
    finished(recipe)
    newest = recipe.distillation.checkpoints / checkpoint_tag(4) / "checkpoint.json"
    plan = yaml.safe_load(PLAN)
    more = plan["units"][0] | {"name": "other"}
    recipe.distillation.plan.write_text(yaml.safe_dump(plan | {"units": [*plan["units"], more]}))
    assert early.is_finished(recipe, recipe.distillation, 4, "")
    recipe.plan_file.write_text(yaml.safe_dump(plan | {"units": [*plan["units"], more]}))
    assert not early.is_finished(recipe, recipe.distillation, 4, ""), "the checkpoint lacks it"
    recipe.plan_file.write_text(yaml.safe_dump(plan | {"units": [plan["units"][0] | {"streams": ["image"]}]}))
    assert not early.is_finished(recipe, recipe.distillation, 4, ""), "another unit of that name"
    recipe.plan_file.write_text(PLAN)
    newest.unlink()
    assert not early.is_finished(recipe, recipe.distillation, 4, "")


def test_a_plan_that_has_been_checked_is_known_until_something_changes(path: Path) -> None:
    recipe = load_recipe(path)
    memory = early.PlanMemory(recipe)
    assert not memory.known
    memory.remember()
    assert "is in order, as when it was last" in without_torch("plan", path, "--check", code=0)
    assert not early.PlanMemory(load_recipe(path, ["teacher.options={max_sequence_length: 2}"])).known
    recipe.plan_file.write_text(PLAN + "# edited\n")
    assert not memory.known
    memory.remember()
    (recipe.teacher.path / "transformer" / "config.json").write_text('{"num_layers": 2}')
    assert not memory.known


def test_the_words_that_options_know_are_those_of_what_they_choose() -> None:
    for words, known in (
        (export_cli._DTYPES, FORMATS),
        (export_cli._TOOLS, TOOLS),
        (export_cli._GGUF, TYPES),
        (export_cli._QUANTISED, PACKAGES),
        (export_cli._STRATEGIES, STRATEGIES),
    ):
        assert set(words.split("|")) == set(known)


def test_who_is_silent_for_long_says_first_what_it_does(path: Path) -> None:
    """Reading the teacher needs torch, which is not there: whatever was printed came before."""
    text = "import sys\nsys.modules['torch'] = None\nfrom ppcl_ds.cli import main\nmain()"
    for command in ("probe --merge", "plan", "estimate", "distill --dry-run", "evaluate", "consolidate"):
        name, *options = command.split()
        done = subprocess.run([sys.executable, "-c", text, name, path, *options], capture_output=True, text=True)
        assert " ...\n" in done.stderr.partition("Traceback")[0], command
