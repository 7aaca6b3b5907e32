"""What can be known to be wrong is one line and exit code 2, and nothing is in the queue."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import make_recipe
from tests.distill.test_library import PLAN
from tests.slurm.conftest import CLUSTER, HERE
from tests.slurm.daemons import Daemons

pytestmark = pytest.mark.slurm


@pytest.fixture
def path(tmp_path: Path, prepared: Callable[[str], Path]) -> Path:
    """A recipe whose chain could be submitted, up to its shards: nothing is encoded yet."""
    run = tmp_path / "my run"
    shutil.copytree(prepared("qwen"), run, ignore=shutil.ignore_patterns("encoded"))
    path = tmp_path / "recipe.yaml"
    cluster = CLUSTER | {"scripts": str(HERE / "slurm")}
    path.write_text(yaml.safe_dump(make_recipe("qwen", run) | {"cluster": cluster}))
    return path


def edit(path: Path, section: str, **values: Any) -> None:
    recipe = yaml.safe_load(path.read_text())
    recipe[section] |= values
    path.write_text(yaml.safe_dump(recipe))


def submit(path: Path, daemons: Daemons, *arguments: str, before: str = "") -> tuple[int, str]:
    """`ppcl submit`, in a mount namespace of its own in which `before` has been done."""
    jobs = daemons.states()
    namespace = ["unshare", "--mount", "sh", "-c", f'{before or ":"} && exec "$@"', "sh"]
    done = subprocess.run(
        [*namespace, sys.executable, "-m", "ppcl_ds.cli", "submit", str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=daemons.environment,
    )
    assert daemons.states() == jobs, "something was queued"
    return done.returncode, done.stdout + done.stderr


def refused(path: Path, daemons: Daemons, *words: str, arguments: tuple[str, ...] = (), before: str = "") -> None:
    code, printed = submit(path, daemons, *arguments, before=before)
    assert code == 2, printed
    [line] = [line for line in printed.splitlines() if line]
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def test_a_sound_request_passes_every_check(path: Path, daemons: Daemons) -> None:
    code, printed = submit(path, daemons, "--dry-run")
    assert code == 0, printed
    lines = [line for line in printed.splitlines() if line.startswith("sbatch ")]
    assert len(lines) == 7
    assert sum("--nodes=2" in line for line in lines) == 2  # probe and distill
    folder = path.parent / "my run" / "slurm"
    assert (folder / "recipe.yaml").read_text() == path.read_text()
    for script in (HERE / "slurm").iterdir():
        assert (folder / script.name).read_bytes() == script.read_bytes()
    environment = yaml.safe_load((folder / "environment.json").read_text())
    assert environment["topology"] == {"stages": 2, "replicas": 1, "nodes": 2}
    assert environment["versions"].keys() >= {"torch", "deepspeed", "slurm", "python", "ppcl-ds"}


def test_more_stages_than_units(path: Path, daemons: Daemons) -> None:
    edit(path, "topology", stages=20)
    edit(path, "distill", micro_batches_per_step=20)
    refused(path, daemons, "topology.stages is 20, but the plan cannot have more than ", "use at most one stage a unit")
    PLAN.save(path.parent / "my run" / "plan.yaml")
    refused(path, daemons, f"the plan has only {len(PLAN.units)} units")


def test_what_slurm_does_not_have(path: Path, daemons: Daemons) -> None:
    edit(path, "cluster", options=["--partition=gold"])
    refused(path, daemons, "sbatch: ", "invalid partition specified: gold")
    edit(path, "cluster", options=["--nodes=3"])
    refused(path, daemons, "sbatch: ", "node configuration is not available")
    edit(path, "cluster", options=[], gpus=True)
    refused(path, daemons, "sbatch: ", "gres")


def test_shards_that_are_missing(path: Path, daemons: Daemons) -> None:
    raw = path.parent / "my run" / "shards" / "raw"
    refused(path, daemons, "plan has not been done", arguments=("--from", "distill"))
    next(raw.glob("train-*.tar")).unlink()
    refused(path, daemons, "is missing or cut short; run `ppcl-data shard RECIPE`")
    shutil.rmtree(raw)
    refused(path, daemons, f"{raw}/index.json is missing; run `ppcl-data shard RECIPE` first")


def test_a_run_folder_that_cannot_be_written(path: Path, daemons: Daemons) -> None:
    """Root may write anywhere, so the folder is mounted read-only."""
    run = path.parent / "my run"
    before = f'mount --bind "{run}" "{run}" && mount -o remount,bind,ro "{run}"'
    refused(path, daemons, f"{run}/slurm", "Read-only file system", "nothing is queued", before=before)


def test_a_disk_that_is_too_small(path: Path, daemons: Daemons) -> None:
    run = path.parent / "my run"
    small = path.parent / "small"
    shutil.copytree(run, small)
    before = f'mkdir "{run}/mnt" && mount -t tmpfs -o size=600k tmpfs "{run}/mnt" && cp -r "{small}/." "{run}/mnt"'
    recipe = yaml.safe_load(path.read_text())
    recipe["run"] = f"{run}/mnt"
    path.write_text(yaml.safe_dump(recipe))
    refused(path, daemons, "are free on its disk", before=before)


def test_a_run_that_does_not_fit(path: Path, daemons: Daemons) -> None:
    edit(path, "cluster", accelerator="h10")
    refused(path, daemons, "did you mean 'h100'?")
    edit(path, "cluster", accelerator="rtx4090")
    edit(path, "distill", micro_batch=10**6)
    refused(path, daemons, "distilling needs ", "GiB on an rtx4090")


def test_a_machine_without_slurm(path: Path, daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(daemons.environment, "PATH", f"{os.path.dirname(sys.executable)}:/bin/nowhere")
    done = subprocess.run(
        [sys.executable, "-m", "ppcl_ds.cli", "submit", str(path)],
        capture_output=True,
        text=True,
        env=daemons.environment,
    )
    assert done.returncode == 2
    assert "sbatch is not on the PATH" in done.stderr
