"""Memory that is not enough is one line on every road, before it happens where that can be known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppcl_ds import memory
from ppcl_ds.errors import UserError
from ppcl_ds.estimate import card
from ppcl_ds.estimate.inputs import read_inputs
from ppcl_ds.recipe import load_recipe
from ppcl_ds.watch.tensorboard import memory_figures
from tests.conftest import command
from tests.plans import three_spans
from tests.ranks import environment, run

GREEDY = "tests.training.greedy"


@pytest.fixture
def planned(new_run: Callable[..., Path]) -> Path:
    path = new_run("qwen", distill={"steps": 2})
    three_spans().save(load_recipe(path).plan_file)
    return path


@pytest.mark.parametrize(
    ("where", "phase"),
    [
        ("ppcl_ds.training.trainer:load_teacher", "at its start"),
        ("ppcl_ds.distill.trainer:read_teacher", "in phase 'teacher'"),
        ("ppcl_ds.distill.library:boundary_loss", "in phase 'students'"),
    ],
)
def test_a_training_names_the_phase_and_what_to_lower(planned: Path, where: str, phase: str) -> None:
    """Whichever rank it happens to: one line, the command's exit code is 2, and nobody hangs."""
    done = run(GREEDY, "distill", planned, env={"GREEDY": f"1:{where}"}, timeout=60)
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = [line for line in done.stderr.splitlines() if "out of memory" in line]
    assert line.startswith(f"error: distill: out of memory {phase}; set distill.activation_checkpointing, ")
    assert "distill.optimizer.offload" in line
    assert "set teacher.offload: cpu" in line
    assert "Traceback" not in done.stderr


def test_other_commands_do_so_too(planned: Path) -> None:
    def refused(where: str, *arguments: str | Path) -> str:
        done = run(GREEDY, *arguments, env={"GREEDY": f"0:{where}"}, timeout=60)
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr.splitlines()[-1].removeprefix("error: ")

    said = refused("ppcl_ds.probing.probe:add_capture", "probe", planned)
    assert said == (
        "probe: out of memory in phase 'sums'; lower probe.batch_size or probe.blocks_at_once, or set "
        "teacher.offload: cpu"
    )
    command("distill", planned)
    run_folder = load_recipe(planned).run
    said = refused("ppcl_ds.planning.measure:forward", "plan", planned, "--from-run", run_folder)
    assert said == "plan: out of memory in phase 'units alone'; lower evaluate.batch_size"
    command("consolidate", planned)
    said = refused("ppcl_ds.evaluate.figures:forward", "evaluate", planned)
    assert said == (
        "evaluate: out of memory in phase 'figures of teacher'; lower evaluate.batch_size, or measure on the CPU with "
        "CUDA_VISIBLE_DEVICES="
    )


def test_the_inner_phase_counts_and_other_errors_pass() -> None:
    def fails(fault: RuntimeError) -> None:
        with memory.told("evaluate", "buy more"), memory.phase("outer"), memory.phase("inner"):
            raise fault

    with pytest.raises(UserError, match=r"evaluate: out of memory in phase 'inner'; buy more"):
        fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    with pytest.raises(RuntimeError, match="shapes"):
        fails(RuntimeError("shapes do not match"))


def test_a_card_that_is_too_small_is_said_before_the_first_step(
    planned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(planned)
    inputs = read_inputs(recipe, 1, 2)
    peak = max(stage.peak for stage in card.stage_memories(inputs))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(card.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(card.dist, "get_world_size", lambda: 2)
    for free, warns in ([None, None], False), ([10 * peak, peak], True), ([2 * peak, 2 * peak], False):
        monkeypatch.setattr(card.launch, "all_gather", lambda own, free=free: free)
        card.warn_if_too_small(recipe, inputs.teacher)
        printed = capsys.readouterr().out
        assert printed.count("\n") == int(warns)
        assert printed.startswith("warning: ") is warns
        assert ("distill.optimizer.offload" in printed) is warns


@pytest.mark.parametrize(
    ("own", "left"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, "None"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:False"),
    ],
)
def test_segments_grow_unless_the_environment_says_otherwise(own: dict[str, str], left: str) -> None:
    """In every command, whoever has started it; before torch is there, which reads it once."""
    code = (
        "import os, sys, typer\nfrom ppcl_ds import console\napp = typer.Typer()\n"
        "@app.command()\ndef main() -> None:\n"
        "    print('torch' in sys.modules, os.environ.get('PYTORCH_ALLOC_CONF'))\nconsole.run(app)"
    )
    bare = {key: value for key, value in environment().items() if "ALLOC_CONF" not in key}
    done = subprocess.run([sys.executable, "-c", code], env=bare | own, text=True, capture_output=True, check=True)
    assert done.stdout.split() == ["False", left]


def test_a_gpu_also_says_what_torch_holds_and_how_often_it_was_short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(memory_figures(3)) == {"memory_gib/rank_3"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**31)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 5})
    found = {"memory_gib/rank_3": 1.0, "memory_reserved_gib/rank_3": 2.0, "memory_retries/rank_3": 5.0}
    assert memory_figures(3) == found
