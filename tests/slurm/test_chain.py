"""The page's road on a real Slurm: one `ppcl submit`, from raw shards to models as good as a single machine's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppcl_ds.sections import shipped
from tests.conftest import command
from tests.slurm.conftest import CLUSTER, Account
from tests.slurm.daemons import Daemons

pytestmark = pytest.mark.slurm

RUN = 'it\'s "my" run'
FIGURES = ("params", "block_params_ratio", "accuracy", "frechet", "velocity_mse", "sample_mse", "weights")


def recipe(run: str) -> dict[str, Any]:
    """The demo's recipe, shortened."""
    short = yaml.safe_load(shipped("recipes/digits.yaml").read_text())
    short["run"] = run
    short["demo"]["steps"] = 20
    short["distill"] |= {"steps": 12, "log_every": 2, "sample_every": 0, "checkpoint_every": 100, "micro_batch": 8}
    short["probe"] = {"batch_size": 16, "batches": 2}
    short["evaluate"] |= {"samples": 16, "batch_size": 16, "steps": 2, "velocity_batches": 1}
    return short


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the demo on this machine alone."""
    if Path("/tmp/h7-local/run/report.json").exists():  # DEV
        return Path("/tmp/h7-local/run")  # DEV
    folder = tmp_path_factory.mktemp("local")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(str(folder / "run"))))
    command("demo", path)
    return folder / "run"


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory, daemons: Daemons, local: Path) -> Account:
    """After one `ppcl submit`, with the demo's pictures and teacher as what a user has."""
    account = Account(tmp_path_factory.mktemp("home") / "ann's home", daemons, RUN)
    account.types("prepare")
    account.edits(recipe(f"runs/{RUN}") | {"cluster": CLUSTER})
    for name in ("images", "teacher"):
        shutil.copytree(local / name, account.run / name)
    account.types("submit")
    account.waits()
    return account


def test_the_chain_gives_the_numbers_of_a_single_machine(account: Account, local: Path) -> None:
    assert (account.run / "plan.yaml").read_text() == (local / "plan.yaml").read_text()
    found, expected = (
        {row["name"]: row for row in json.loads((run / "report.json").read_text())["models"]}
        for run in (account.run, local)
    )
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert {key: found[name][key] for key in FIGURES} == {key: row[key] for key in FIGURES}, name
