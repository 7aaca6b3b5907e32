"""The page's road on a real Slurm: one `ppcl submit`, from raw shards to models as good as a single machine's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppcl_ds.shipped import shipped
from ppcl_ds.steps import STEPS
from tests.slurm.conftest import CLUSTER, SITE, Account
from tests.slurm.daemons import Daemons

pytestmark = pytest.mark.slurm

RUN = 'it\'s "my" run'
FIGURES = ("params", "block_params_ratio", "accuracy", "frechet", "velocity_mse", "sample_mse", "weights")


def recipe(run: str, prompts: Path) -> dict[str, Any]:
    """The demo's recipe, shortened, and with a prompt set."""
    short = yaml.safe_load(shipped("recipes/digits.yaml").read_text())
    short["run"] = run
    short["demo"]["steps"] = 20
    short["distill"] |= {"steps": 12, "log_every": 2, "sample_every": 0, "checkpoint_every": 100, "micro_batch": 8}
    short["finetune"] |= {"steps": 4, "log_every": 2, "sample_every": 0, "checkpoint_every": 100, "micro_batch": 8}
    short["probe"] = {"batch_size": 16, "batches": 2}
    short["evaluate"] |= {"samples": 16, "batch_size": 16, "steps": 2, "velocity_batches": 1}
    short["evaluate"]["sets"] = [{"name": "mine", "prompts": str(prompts), "per_prompt": 2}]
    return short


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the demo on this machine alone."""
    folder = tmp_path_factory.mktemp("local")
    path = folder / "recipe.yaml"
    (folder / "prompts.txt").write_text('the digit one\nthe digit "two"\nit\'s a three\n')
    path.write_text(yaml.safe_dump(recipe(str(folder / "run"), folder / "prompts.txt")))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "ppcl_ds.cli", "demo", path], check=True, timeout=900, env=environment)
    return folder / "run"


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory, daemons: Daemons, local: Path) -> Account:
    """After one `ppcl submit`, with the demo's pictures and teacher as what a user has."""
    account = Account(tmp_path_factory.mktemp("home") / "ann's home", daemons, RUN)
    account.types("prepare")
    account.edits(recipe(f"runs/{RUN}", local.parent / "prompts.txt") | {"cluster": CLUSTER})
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


def test_prompt_sets_are_drawn_by_several_processes_as_by_one(account: Account, local: Path) -> None:
    drawn, expected = (
        {path.relative_to(run).as_posix(): path.read_bytes() for path in run.glob("evaluate/mine/images/**/*.png")}
        for run in (account.run, local)
    )
    assert len(expected) == 3 * 2 * 5  # prompts, images of each, models
    assert drawn == expected
    [own], [other] = (json.loads((run / "report.json").read_text())["sets"] for run in (account.run, local))
    for each in (own, other):  # whole folders and what is named by them differ, as cards name the teacher's folder
        del each["weights"]
        for worst in each["worst"]:
            del worst["images"]
    assert own == other
    assert "2 processes" in next((account.run / "slurm" / "logs").glob("evaluate-*.out")).read_text()


def test_each_step_ran_as_its_jobs(account: Account) -> None:
    tasks = dict.fromkeys(STEPS, 1) | {"encode": 2, "probe": 2, "consolidate": 4}
    assert list(account.chain()) == list(tasks)
    logs = account.run / "slurm" / "logs"
    assert {step: len(list(logs.glob(f"{step}-*.out"))) for step in tasks} == tasks
    ranks = logs / f"distill-{account.chain()['distill']}" / "start-0"
    for node in ("n1", "n2"):
        [log] = (ranks / node).glob("*/attempt_0/*/stdout.log")
        assert log.exists()
    printed = account.types("look")
    assert [f" {step} " in printed for step in tasks] == [True] * len(tasks)
    assert "12 of 12" in printed
    assert "samples/s" in printed


def test_a_prompt_with_quotes_is_drawn(account: Account) -> None:
    account.shell(f"""
        ppcl sample {account.quoted_run}/pruned/small --prompt 'it'"'"'s "three"' \
            --steps 1 --out "it's a picture.png"
    """)
    assert (account.home / "it's a picture.png").stat().st_size


def test_what_is_done_is_not_done_again(account: Account) -> None:
    assert "every step is done" in account.shell("ppcl submit my.yaml")
    lines = account.shell("ppcl submit my.yaml --from consolidate --dry-run").splitlines()
    assert [line.split("-")[-1] for line in lines if line.startswith("sbatch ")]
    assert sum(line.startswith("sbatch ") for line in lines) == 2


def test_scripts_are_submitted_by_hand(account: Account) -> None:
    (account.home / "slurm" / "site.env").open("a").write(SITE)
    jobs = re.findall(r"Submitted batch job (\d+)", account.types("by-hand"))
    assert len(jobs) == 2
    account.daemons.wait_for("their end", lambda: account.daemons.ended(*jobs), 300)
    assert {state for job, state in account.daemons.states() if job in jobs} == {"COMPLETED"}


FAULT = """
import os, sys

class Fault:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "ppcl_ds.distill.trainer":
            raise RuntimeError("here alone")

if "RANK" in os.environ and os.environ["SLURMD_NODENAME"] == "n2":
    sys.meta_path.insert(0, Fault)
"""


def test_of_a_rank_that_fails_alone_status_shows_the_error(account: Account) -> None:
    (account.home / "fault").mkdir()
    (account.home / "fault" / "sitecustomize.py").write_text(FAULT)
    account.shell('PYTHONPATH="$PWD/fault" ppcl submit my.yaml --from distill --set distill.steps=99')
    account.daemons.wait_for("the end", lambda: account.daemons.ended(*account.chain().values()), 300)
    assert account.states()["distill"] == {"FAILED"}
    said = "distill: n2, local rank 0: RuntimeError: here alone"
    assert said in account.shell(f"ppcl status {account.quoted_run}").splitlines()
    # Minutes later Slurm knows nothing of the job.
    slurm = account.run / "slurm"
    jobs, job = (slurm / "jobs.json").read_text(), account.chain()["distill"]
    (slurm / "jobs.json").write_text(jobs.replace(f'"{job}"', '"990000"'))
    for log in (slurm / "logs").glob(f"distill-{job}*"):
        log.rename(log.with_name(log.name.replace(job, "990000")))
    printed = account.shell(f"ppcl status {account.quoted_run}")
    assert "forgotten by Slurm" in printed
    assert said in printed.splitlines()


def test_what_cannot_go_on_fails_and_status_says_why(account: Account) -> None:
    [lost] = (account.run / "distill" / "checkpoints").glob("step-*/rank-00001.safetensors")
    lost.unlink()
    account.shell("ppcl submit my.yaml --from distill --set distill.steps=99")  # a finished one starts no rank
    account.daemons.wait_for("the end", lambda: account.daemons.ended(*account.chain().values()), 300)
    assert account.states() == {"distill": {"FAILED"}} | {step: {"CANCELLED"} for step in STEPS[5:]}
    assert "without a checkpoint since this start; not requeued" in account.log("distill")
    printed = account.shell(f"ppcl status {account.quoted_run}")
    [line] = [line for line in printed.splitlines() if line.startswith("distill: ")]
    assert "error: checkpoint " in line
    assert "rank-00001.safetensors cannot be read" in line
    assert not account.daemons.processes()
