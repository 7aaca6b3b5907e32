"""Promises about recipes: what a run could not survive, or YAML passes over, is one plain line that says where."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe, load_recipe, open_run

TEXT = """\
run: runs/a
data:
  source: my_images
  shards: "{run}/shards"
  images: {size: 64}
  heldout: 0.1
teacher: {path: models/teacher}
plan:
  variants:
    small: 0.5
distill:
  steps: 4
  micro_batch: 2
  micro_batches_per_step: 1
"""


def load(folder: Path, text: str | bytes) -> Recipe:
    path = folder / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(path)


def fault(folder: Path, text: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text)
    message = str(caught.value)
    assert message.startswith(f"recipe {folder / 'r.yaml'}")
    assert message.isprintable()
    for raw in ("Input should", "unable to parse", "valid integer", "type=", "Value error"):
        assert raw not in message
    return message.removeprefix(f"recipe {folder / 'r.yaml'}")


def test_the_recipe_of_these_tests_is_fine(tmp_path: Path) -> None:
    assert load(tmp_path, TEXT).data.shards == Path("runs/a/shards")
    assert load(tmp_path, b"\xef\xbb\xbf" + TEXT.encode()).distill.steps == 4
    assert load(tmp_path, TEXT.replace("\n", "\r\n")).distill.steps == 4


@pytest.mark.parametrize(
    ("more", "line", "key", "first"),
    [
        ("distill: {steps: 400000}\n", 15, "distill", 11),
        ("run: again\n", 15, "run", 1),
        ("topology: {stages: 1, stages: 2}\n", 15, "stages", 15),
        ("evaluate:\n  steps: 3\n  samples: 2\n  'steps': 4\n", 18, "steps", 16),
        ("finetune:\n  optimizer: {lr: 1.0e-4, betas: [0.9, 0.9],\n    lr: 1.0e-5}\n", 17, "lr", 16),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_lines(
    tmp_path: Path, more: str, line: int, key: str, first: int
) -> None:
    assert fault(tmp_path, TEXT + more) == f", line {line}: key '{key}' stands in line {first} already; keep one"


def test_anchors_and_merges_are_no_keys_that_stand_twice(tmp_path: Path) -> None:
    text = TEXT + "evaluate: &e {steps: 3, samples: 5}\n" + "finetune:\n  <<: *f\n  steps: 9\n"
    text = text.replace("distill:\n", "distill: &f\n")
    assert load(tmp_path, text).tuning.steps == 9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 4", "steps: many", "distill.steps must be a whole number, not 'many' (line 12)"),
        ("steps: 4", "steps: 1e6", "distill.steps must be a whole number, not '1e6' (line 12)"),
        ("steps: 4", "steps: 4.5", "distill.steps must be a whole number, not 4.5 (line 12)"),
        ("steps: 4", "steps: -4", "distill.steps must be more than 0, not -4 (line 12)"),
        ("steps: 4", "steps:", "distill.steps must be a whole number, not nothing (line 12)"),
        ("steps: 4", f"steps: {10**30}", "distill.steps: must be at most 1e+18 (line 12)"),
        ("small: 0.5", "small: half", "plan.variants.small must be a number, not 'half' (line 10)"),
        ("small: 0.5", "small: .nan", "plan.variants.small must be a finite number, not nan (line 10)"),
        ("small: 0.5", "small: 2", "plan.variants.small must be less than 1.0, not 2 (line 10)"),
        ("steps: 4", "steps: 4\n  loss: mse", "unknown key 'distill.loss' (line 13); known: steps, "),
        ("small: 0.5", "small: 0.5\n  rule: best", "plan.rule must be one of 'error', 'ppcl'"),
        ("heldout: 0.1", "heldout: 1.0", "data.heldout must be less than 1.0, not 1.0 (line 6)"),
        ("{size: 64}", "64", "data.images must be a section of keys and values, not 64 (line 5)"),
        ("source: my_images", "source: 5", "data.source: must be a path, an address, or a list of these (line 3)"),
        ("source: my_images", "source: []", "data.source: must be a path, an address, or a list of these (line 3)"),
        ("  source: my_images\n", "", "key 'data.source' is missing (line 2)"),
        ("run: runs/a", "run: 5", "run must be a path, not 5 (line 1)"),
        (
            "  micro_batch: 2",
            "  micro_bach: 2",
            "unknown key 'distill.micro_bach' (line 13); did you mean 'micro_batch'?",
        ),
        ("steps: 4", "steps: 4\n  activation_checkpointing: 7", "must be true or false, not 7 (line 13)"),
        (
            "steps: 4",
            "steps: 4\n  optimizer: {betas: [0.9, 1.5]}",
            "optimizer.betas.1 must be less than 1.0, not 1.5 (line 13)",
        ),
        ("steps: 4", "steps: 4\n  optimizer: {betas: [0.9]}", "key 'distill.optimizer.betas.1' is missing (line 13)"),
        ("steps: 4", "steps: 4\n  optimizer: {lr: .inf}", "optimizer.lr must be a finite number, not inf (line 13)"),
        ("steps: 4", "steps: 4\n  timeout: .inf", "distill.timeout must be a finite number, not inf (line 13)"),
        (
            "teacher:",
            "cluster: {time: 24:00:00}\nteacher:",
            "cluster.time must be text, not 86400; put it in quotes (line 7)",
        ),
    ],
)
def test_a_wrong_value_is_a_plain_sentence_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert message in fault(tmp_path, TEXT.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "heldout: 0.1",
            "pipeline: models/x",
            "'data.pipeline' (line 6) is gone; delete it: the pipeline is teacher.path",
        ),
        (
            "heldout: 0.1",
            "captions: {width: 32}",
            "'data.captions' (line 6) is gone; delete it: the pipeline at teacher",
        ),
        ("{size: 64}", "{size: 64, encoder: vae}", "'data.images.encoder' (line 5) is gone; delete it: the VAE of"),
        ("{size: 64}", "{size: 64, channels: 3}", "'data.images.channels' (line 5) is gone; delete it: the VAE of"),
        ("plan:", "noise: {shift: 3.0}\nplan:", "'noise.shift' (line 8) is gone; delete it: the scheduler of"),
    ],
)
def test_a_key_that_is_gone_says_what_answers_it_now(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert f": key {message}" in fault(tmp_path, TEXT.replace(old, new))


def test_the_recipe_of_an_earlier_releases_run_is_read_without_what_is_gone(tmp_path: Path) -> None:
    recipe = load(tmp_path, TEXT.replace("runs/a", str(tmp_path)))
    written = json.loads(recipe.model_dump_json())
    written["data"] |= {"pipeline": "models/x", "captions": {"width": 32}}
    written["data"]["images"] |= {"encoder": "vae", "channels": 1}
    written["noise"]["shift"] = 3.0
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "recipe.json").write_text(json.dumps(written))
    assert open_run(tmp_path) == recipe
    for damaged in (json.dumps(written | {"unheard_of": 1}), "[1]", "{", '{"data": 3, "noise": null}'):
        (tmp_path / "distill" / "recipe.json").write_text(damaged)
        with pytest.raises(UserError, match=r"recipe.json cannot be read \(.*\); give the recipe file"):
            open_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.encode("utf-16"), " is in UTF-16; save it as UTF-8"),
        (TEXT.encode("utf-16-le"), " holds NUL characters (UTF-16?); save it as UTF-8"),
        (
            TEXT.replace("my_images", "Bücher").encode("latin-1"),
            ", line 3: byte 0xfc is not UTF-8 (Latin-1?); save it as",
        ),
        (TEXT.replace("  source:", "\tsource:"), ", line 3: not valid YAML: found character '\\t' that cannot start"),
        (TEXT.replace("{size: 64}", "{size: 64"), ", line 6: not valid YAML: expected ',' or '}'"),
        (TEXT + "\x07", ": not valid YAML: "),
        ("", ": expected keys and values, found NoneType"),
        ("just text", ": expected keys and values, found str"),
        ("a: " + "[" * 5000, ": not valid YAML: it is nested too deeply"),
        (
            TEXT + "evaluate: !!python/object:os.system {}",
            ", line 15: not valid YAML: could not determine a constructor",
        ),
        (TEXT + "demo: {steps: 1, config: {a: 2001-99-99}}", ": not valid YAML: month must be in 1..12"),
    ],
)
def test_what_is_no_recipe_says_what_it_is(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in fault(tmp_path, text)


def test_paths_are_read_as_a_shell_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DISK", "/disk")
    text = TEXT.replace("runs/a", "~/runs/a").replace("models/teacher", "$DISK/teacher")
    recipe = load(tmp_path, text.replace("my_images", "${DISK}/images"))
    assert recipe.run == tmp_path / "home/runs/a"
    assert recipe.data.shards == tmp_path / "home/runs/a/shards"
    assert recipe.teacher.path == Path("/disk/teacher")
    assert recipe.data.source == "/disk/images"
    several = load(tmp_path, TEXT.replace("my_images", "[~/a, 'pipe:cat ~/b $DISK/{0..1}.tar']"))
    assert several.data.source == (str(tmp_path / "home/a"), "pipe:cat ~/b $DISK/{0..1}.tar"), (
        "its own shell reads that"
    )
    assert "$NOWHERE is not set, so $NOWHERE/x is no path (line 1)" in fault(
        tmp_path, TEXT.replace("runs/a", "$NOWHERE/x")
    )
    (tmp_path / "$odd").mkdir()
    assert load(tmp_path, TEXT.replace("my_images", f"{tmp_path}/$odd")).data.source == f"{tmp_path}/$odd"


def test_a_recipe_that_is_not_there_says_from_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"recipe no/r.yaml: no such file or folder, seen from {tmp_path}"):
        load_recipe(Path("no/r.yaml"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["steps", "micro_batch", "timeout", "log_every", "magnitude_weight"]),
    st.one_of(st.floats(), st.integers(), st.text(max_size=20), st.none(), st.lists(st.integers(), max_size=2)),
)
def test_whatever_stands_in_a_recipe_it_is_used_or_one_line(tmp_path: Path, key: str, value: object) -> None:
    recipe = yaml.safe_load(TEXT)
    recipe["distill"][key] = value
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    try:
        read = getattr(load_recipe(path).distill, key)
    except UserError as known:
        assert f"distill.{key}" in str(known)  # noqa: PT017
        assert str(known).isprintable()  # noqa: PT017
    else:
        assert math.isfinite(read)
        assert read == float(value)  # type: ignore[arg-type]


def test_run_stands_for_the_run_folder_in_lists_too(tmp_path: Path) -> None:
    text = TEXT.replace("source: my_images", 'source: ["{run}/images", others]')
    assert [str(source) for source in load(tmp_path, text).data.source] == ["runs/a/images", "others"]
