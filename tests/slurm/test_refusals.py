"""What can be known to be wrong is one line and exit code 2, and nothing is in the queue."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppcl_ds.cluster.submit import submit
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import load_recipe
from tests.conftest import make_recipe
from tests.plans import ten_spans
from tests.slurm.conftest import CLUSTER, HERE
from tests.slurm.daemons import Daemons

pytestmark = pytest.mark.slurm

PLAN = ten_spans()


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


@pytest.fixture(autouse=True)
def queue(daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real one, in which nothing may be afterwards that was not there before."""
    monkeypatch.setenv("SLURM_CONF", str(daemons.conf))
    before = dict(daemons.states())
    yield
    assert dict(daemons.states()).keys() <= before.keys(), "something was queued"  # Slurm forgets old ones meanwhile


def refused(path: Path, *words: str, start: str | None = None) -> None:
    with pytest.raises(UserError) as fault:
        submit(path, load_recipe(path), start, dry_run=False)
    assert "\n" not in str(fault.value)
    assert all(word in str(fault.value) for word in words), fault.value


def refused_in(before: str, path: Path, *words: str) -> None:
    """As users see it, in a mount namespace of its own in which `before` has been done."""
    namespace = ["unshare", "--mount", "sh", "-c", f'{before} && exec "$@"', "sh"]
    done = subprocess.run(
        [*namespace, sys.executable, "-m", "ppcl_ds.cli", "submit", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line


def test_a_sound_request_passes_every_check(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(path, load_recipe(path), None, dry_run=True)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("sbatch ")]
    assert len(lines) == 7
    assert sum("--nodes=2" in line for line in lines) == 2  # probe and distill
    folder = path.parent / "my run" / "slurm"
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == yaml.safe_load(path.read_text())
    for script in (HERE / "slurm").iterdir():
        assert (folder / script.name).read_bytes() == script.read_bytes()
    environment = yaml.safe_load((folder / "environment.json").read_text())
    assert environment["topology"] == {"stages": 2, "replicas": 1, "nodes": 2}
    head = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (environment["git"] or "").removesuffix("-dirty") == head
    assert environment["versions"].keys() >= {"torch", "deepspeed", "slurm", "python", "ppcl-ds"}


def test_more_stages_than_units(path: Path) -> None:
    edit(path, "topology", stages=20)
    edit(path, "distill", micro_batches_per_step=20)
    refused(path, "topology.stages is 20, but the plan cannot have more than ", "use at most one stage a unit")
    PLAN.save(path.parent / "my run" / "plan.yaml")
    refused(path, f"the plan has only {len(PLAN.units)} units")


def test_what_slurm_does_not_have(path: Path) -> None:
    edit(path, "cluster", options=["--partition=gold"])
    refused(path, "sbatch: ", "invalid partition specified: gold")
    edit(path, "cluster", options=["--nodes=3"])
    refused(path, "sbatch: ", "node configuration is not available")
    edit(path, "cluster", options=[], gpus=True)
    refused(path, "sbatch: ", "gres")


def test_shards_that_are_missing(path: Path) -> None:
    raw = path.parent / "my run" / "shards" / "raw"
    refused(path, "--from distill: encode has not been done", start="distill")
    next(raw.glob("train-*.tar")).unlink()
    refused(path, "is missing or cut short; run `ppcl-data shard RECIPE`")
    shutil.rmtree(raw)
    refused(path, f"{raw}/index.json is missing; run `ppcl-data shard RECIPE` first")


def test_a_run_folder_that_cannot_be_written(path: Path) -> None:
    """Root may write anywhere, so the folder is mounted read-only."""
    run = path.parent / "my run"
    before = f'mount --bind "{run}" "{run}" && mount -o remount,bind,ro "{run}"'
    refused_in(before, path, f"{run}/slurm", "Read-only file system", "nothing is queued")


def test_a_disk_that_is_too_small(path: Path) -> None:
    run, small = path.parent / "my run", path.parent / "small disk"
    path.write_text(path.read_text().replace("{run}", str(run)).replace(f"run: {run}", f"run: {small}"))
    refused_in(f'mkdir "{small}" && mount -t tmpfs -o size=200k tmpfs "{small}"', path, "are free on its disk")


def test_a_run_that_does_not_fit(path: Path) -> None:
    edit(path, "cluster", accelerator="h10")
    refused(path, "did you mean 'h100'?")
    edit(path, "cluster", accelerator="rtx4090")
    edit(path, "data", images={"size": 512})
    edit(path, "distill", micro_batch=256)
    refused(path, "distilling needs ", "GiB on an rtx4090")


def test_a_machine_without_slurm(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {"PATH": "/nowhere"})
    refused(path, "sbatch is not on the PATH")
