"""What is streamed to disk is the variant, file for file as `save_pretrained` would write it."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ppcl_ds.errors import UserError
from ppcl_ds.export.card import write_card
from ppcl_ds.export.consolidate import Export, Form, consolidate, read_switches, replug
from ppcl_ds.export.model_folder import shard_bytes, weights_digest
from ppcl_ds.recipe import Recipe, load_recipe, open_run
from ppcl_ds.record import read_record
from ppcl_ds.teacher.teacher import open_teacher
from ppcl_ds.training.checkpoint import newest_checkpoint
from ppcl_ds.units.plan import Plan, UnitPlan
from ppcl_ds.units.variant import assembled
from tests.conftest import TEACHERS, command
from tests.export.trained import pretend_trained
from tests.families.pipelines.video_wan import wan22
from tests.pipelines import make
from tests.plans import BLOCKS, SPANS, image_spans

NewRun = Callable[..., Path]


def in_memory(recipe: Recipe, family: str, variant: str = "small") -> Any:
    """The variant without streaming."""
    teacher = open_teacher(recipe)
    plan = image_spans(family)
    checkpoint = newest_checkpoint(recipe.distillation.checkpoints)
    return assembled(teacher, plan, variant, lambda unit: checkpoint.unit(unit.name))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an unsharded folder, in the format they are stored in."""
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def load(folder: Path, family: str, **options: Any) -> Any:
    return getattr(diffusers, TEACHERS[family][0]).from_pretrained(folder, **options)


@pytest.mark.parametrize("family", TEACHERS)
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_streamed_folder_is_what_save_pretrained_writes(
    new_run: NewRun, tmp_path: Path, family: str, size: str
) -> None:
    recipe = pretend_trained(new_run(family), family)
    consolidate(recipe, ["small"], Form(max_shard_size=shard_bytes(size)))
    model = in_memory(recipe, family)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.clone()  # tensors that share the teacher's mapped file would share a shard, too
    model.save_pretrained(tmp_path / "reference", max_shard_size=size)
    names = sorted(path.name for path in (tmp_path / "reference").iterdir())
    assert (len(names) == 2) == (size == "5GB")
    folder = recipe.pruned("small")
    assert sorted(path.name for path in folder.iterdir()) == names
    assert filecmp.cmpfiles(folder, tmp_path / "reference", names, shallow=False) == (names, [], [])
    torch.testing.assert_close(dict(load(folder, family).state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_the_command_takes_a_recipe_or_a_run_folder_that_was_moved(new_run: NewRun, tmp_path: Path) -> None:
    path = new_run("qwen")
    recipe = pretend_trained(path, "qwen")
    command("consolidate", path)
    assert {folder.name for folder in (recipe.run / "pruned").iterdir()} == {"small", "medium"}
    assert "pruned/medium/" in (recipe.run / "report.html").read_text()
    assert [each.name for each in read_record(recipe.run).commands] == ["consolidate"]
    copy = tmp_path / "elsewhere"
    recipe.run.rename(copy)  # with the teacher in it
    command("consolidate", copy, "--variant", "small", "--out", tmp_path / "mine", "--dtype", "bf16")
    expected = stored(copy / "pruned" / "small" / "transformer")
    wanted = {name: tensor.bfloat16() for name, tensor in expected.items()}
    torch.testing.assert_close(stored(tmp_path / "mine" / "transformer"), wanted, rtol=0, atol=0)
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "mine", capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "transformer/diffusion_pytorch_model.safetensors: OK" in checked.stdout
    with pytest.raises(UserError, match=r"recipe\.json is missing"):
        open_run(tmp_path / "mine")


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.half)]
)
def test_every_tensor_has_the_number_format_asked_for(new_run: NewRun, dtype: str, expected: torch.dtype) -> None:
    recipe = pretend_trained(new_run("sd3"), "sd3")
    consolidate(recipe, ["small"], Form(dtype=dtype))
    found = stored(recipe.pruned("small"))
    assert {tensor.dtype for tensor in found.values()} == {expected}
    wanted = {name: tensor.to(expected) for name, tensor in in_memory(recipe, "sd3").state_dict().items()}
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(switches=st.dictionaries(st.sampled_from(sorted(SPANS["flux"])), st.booleans()))
def test_a_variant_has_the_units_that_are_switched_on_and_the_teachers_blocks_elsewhere(
    switches: dict[str, bool],
) -> None:
    plan = image_spans("flux")
    words = [f"{unit}={'on' if state else 'off'}" for unit, state in switches.items()]
    chosen = {unit for unit in SPANS["flux"] if switches.get(unit, unit in plan.variants["small"])}
    if {"early", "inner"} <= chosen:
        with pytest.raises(UserError, match="overlap"):
            replug(plan, plan, "small", read_switches(words))
        return
    places = replug(plan, plan, "small", read_switches(words)).places("small")
    assert {unit.name for _, unit in places if unit} == chosen
    gone = {block for unit in chosen for block in range(SPANS["flux"][unit][0] + 1, SPANS["flux"][unit][1] + 1)}
    assert [block for block, _ in places] == [block for block in range(BLOCKS["flux"]) if block not in gone]


def test_a_unit_switched_off_gives_the_teachers_blocks_back(new_run: NewRun, tmp_path: Path) -> None:
    recipe = pretend_trained(new_run("qwen"), "qwen")
    teacher = load(recipe.teacher.path / "transformer", "qwen").state_dict()
    consolidate(recipe, ["small"], Form(), ["early=off", "late=off"], tmp_path / "all")
    torch.testing.assert_close(
        dict(load(tmp_path / "all/transformer", "qwen").state_dict()), dict(teacher), rtol=0, atol=0
    )
    consolidate(recipe, ["small"], Form(), ["early=off", "late=off", "inner=on"], tmp_path / "all")
    expected = in_memory(recipe, "qwen", "medium").state_dict()
    found = load(tmp_path / "all/transformer", "qwen").state_dict()
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("variants", "plug", "out", "message"),
    [
        (["small"], ["middle=on"], "new", "unit 'middle' is not in the library; it has: early, inner, late"),
        (["small"], ["inner=on"], "new", r"spans \[0, 2\] of 'early' and \[1, 2\] of 'inner' overlap"),
        (["small"], ["early"], "new", "'early' is not UNIT=on or UNIT=off"),
        (["small"], ["early=off"], None, "give it a folder of its own with --out"),
        ([], ["early=off"], "new", "one variant at a time"),
        ([], [], "new", "one variant at a time"),
        (["tiny"], [], None, "variant 'tiny' is not in the plan"),
        (["small"], [], "taken", "there is something else already"),
    ],
)
def test_what_cannot_be_plugged_or_placed_is_refused_in_one_line(
    new_run: NewRun, tmp_path: Path, variants: list[str], plug: list[str], out: str | None, message: str
) -> None:
    recipe = pretend_trained(new_run("qwen"), "qwen")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(UserError, match=message) as refused:
        consolidate(recipe, variants, Form(), plug, None if out is None else tmp_path / out)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()
    assert not (recipe.run / "pruned").exists()


DRAW = """
import importlib.util, sys, diffusers, numpy, torch
assert importlib.util.find_spec("ppcl_ds") is None
trust = {"trust_remote_code": True} if sys.argv[3] else {}
pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], **trust)
options = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "latent"}
drawn = pipeline("a tiny two", generator=torch.Generator().manual_seed(5), **options).images
numpy.save(sys.argv[2], drawn.numpy())
"""


@pytest.mark.parametrize("family", TEACHERS)
def test_a_variant_is_a_whole_pipeline_that_stock_diffusers_draws_with(
    new_run: NewRun, tmp_path: Path, without_us: Path, family: str
) -> None:
    path = new_run(family)
    pipeline = path.parent / "teacher"
    (pipeline / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    recipe = pretend_trained(path, family)
    consolidate(recipe, ["small"], Form())
    folder = recipe.pruned("small").parent
    trusted = "yes" if family == "qwen" else ""  # whose pipeline is none of diffusers' own
    done = subprocess.run(
        [without_us, "-c", DRAW, folder, tmp_path / "drawn.npy", trusted],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    transformer = in_memory(recipe, family)
    whole: Any = make(family)
    if family == "qwen":
        whole.transformer = transformer
    else:
        whole = type(whole).from_pretrained(pipeline, transformer=transformer)
    options = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "latent"}
    expected = whole("a tiny two", generator=torch.Generator().manual_seed(5), **options).images
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "drawn.npy")), expected)

    card = (folder / "README.md").read_text()
    front = next(yaml.safe_load_all(card.split("---\n")[1]))
    assert front["license"] == "apache-2.0"
    assert "base_model" not in front  # a path is no model to the hub
    assert front["library_name"] == "diffusers"
    assert "| early | blocks 0 to" in card
    assert "DiffusionPipeline.from_pretrained" in card
    assert ("trust_remote_code=True" in card) == bool(trusted)


def test_all_but_the_transformer_is_the_teachers_own_files(new_run: NewRun) -> None:
    """Nothing is copied, and nothing of the teacher's is written to."""
    path = new_run("flux")
    pipeline = path.parent / "teacher"
    (pipeline / "LICENSE.md").write_text("as you like")
    for name in ("flux.safetensors", ".gitattributes", "SHA256SUMS", "README.md", "variant.json"):
        (pipeline / name).write_text("the teacher's")  # its own model in one file, and what exports have, too
    before = {file: file.read_bytes() for file in pipeline.rglob("*") if file.is_file()}
    recipe = pretend_trained(path, "flux")
    consolidate(recipe, ["small"], Form())
    folder = recipe.pruned("small").parent
    assert {file: file.read_bytes() for file in pipeline.rglob("*") if file.is_file()} == before
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    shared = {file.relative_to(pipeline) for part in parts for file in (pipeline / part).rglob("*") if file.is_file()}
    shared |= {Path("LICENSE.md")}
    assert all((folder / name).samefile(pipeline / name) for name in shared)
    written = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()} - shared
    own = {"model_index.json", "README.md", "SHA256SUMS", "variant.json"}
    assert {name.as_posix() for name in written if len(name.parts) == 1} == own
    assert {name.parts[0] for name in written if len(name.parts) > 1} == {"transformer"}


def test_of_two_transformers_one_is_pruned_and_the_other_stays(new_run: NewRun) -> None:
    """Wan 2.2: the second one draws what is less noisy."""
    path = new_run("qwen")
    pipeline = path.parent / "teacher"
    shutil.rmtree(pipeline)
    wan22().save_pretrained(pipeline)
    raw = yaml.safe_load(path.read_text())
    raw["teacher"] |= {"component": "transformer_2"}
    raw["data"]["images"]["size"] = 16
    path.write_text(yaml.safe_dump(raw))
    units = (UnitPlan(name="it", span=(1, 2), streams=("image",)),)
    plan = Plan(teacher="WanTransformer3DModel", blocks=4, units=units, variants={"small": ("it",)})
    recipe = pretend_trained(path, "wan", plan=plan)
    consolidate(recipe, ["small"], Form())
    folder = recipe.run / "pruned" / "small"
    found: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    expected = newest_checkpoint(recipe.distillation.checkpoints).unit("it")
    assert len(found.transformer_2.blocks) == 3
    torch.testing.assert_close(dict(found.transformer_2.blocks[1].state_dict()), expected, rtol=0, atol=0)
    files = list((pipeline / "transformer").iterdir())
    assert files
    assert all((folder / "transformer" / file.name).samefile(file) for file in files)


def test_the_card_has_the_figures_of_the_very_weights_it_describes(new_run: NewRun) -> None:
    path = new_run("qwen")
    recipe = pretend_trained(path, "qwen")
    consolidate(recipe, [], Form())
    folder = recipe.run / "pruned" / "small"
    assert "Not measured yet" in (folder / "README.md").read_text()
    command("evaluate", path)
    row = json.loads((recipe.run / "report.json").read_text())["models"][1]
    line = f"| small | {row['params']:,} | {row['block_params_ratio']:.0%} |"
    assert line in (folder / "README.md").read_text()
    assert f"{row['params']:,} parameters" in (folder / "README.md").read_text()
    consolidate(recipe, ["small"], Form())
    assert line in (folder / "README.md").read_text()
    assert weights_digest(folder) == row["weights"]
    consolidate(recipe, ["small"], Form(dtype="bf16"))
    assert line not in (folder / "README.md").read_text()
    (folder / "variant.json").write_text("{")
    with pytest.raises(UserError, match="consolidate again"):
        write_card(folder, [])


def test_units_are_read_from_disk_only_when_their_shard_is_written(new_run: NewRun) -> None:
    """Laying out a model reads no tensor: the checkpoint's files can be missing until it is written."""
    path = new_run("qwen")
    recipe = pretend_trained(path, "qwen")
    for file in recipe.distillation.checkpoints.glob("*/rank-*"):
        file.unlink()
    export = Export(load_recipe(path), Form())
    with pytest.raises(UserError, match="cannot be read"):
        export.write(export.plan, "small", recipe.run / "out")
    assert not list(recipe.run.glob("out*"))
