"""Fine-tuning on two nodes, a task of an array: what happens to distillation happens to it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import make_recipe
from tests.export.trained import pretend_trained
from tests.slurm.conftest import CLUSTER, Account
from tests.slurm.daemons import Daemons
from tests.slurm.training import Training, expect_undisturbed

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def training(
    tmp_path_factory: pytest.TempPathFactory, daemons: Daemons, prepared: Callable[[str], Path]
) -> Iterator[Training]:
    """With a trained library, jobs that are limited to a minute, and more steps than it will ever take."""
    account = Account(tmp_path_factory.mktemp("home") / "cleo's home", daemons, "a third run")
    shutil.copytree(prepared("qwen"), account.run)
    account.types("prepare")
    recipe = make_recipe("qwen", Path("runs") / account.run.name)
    recipe["distill"] |= {"steps": 7}  # after which `pretend_trained` has written its checkpoint
    recipe["finetune"] = recipe["distill"] | {"steps": 100000, "checkpoint_every": 5, "timeout": 60}
    recipe["finetune"] |= {"variants": ["small"], "micro_batch": 8}
    account.edits(recipe | {"cluster": CLUSTER | {"time": "1", "notice": 5, "requeues": 9}})
    local = account.home / "local.yaml"
    local.write_text(account.recipe.read_text().replace(f"runs/{account.run.name}", str(account.run)))
    pretend_trained(local, "qwen")
    account.shell("ppcl submit my.yaml --from finetune")
    yield Training(account, "finetune", [f"transformer_blocks.{place}" for place in range(3)])
    account.shell(f"ppcl cancel {account.quoted_run}")  # where a test has failed, others need the nodes


def test_at_its_time_limit_it_writes_a_checkpoint_and_gets_in_line_again(training: Training) -> None:
    training.makes_progress()
    training.is_requeued()
    training.is_released()
    assert "time is up, and there is a checkpoint: requeue 1 of at most 9" in training.account.log("finetune")
    training.daemons.run("scontrol", "update", f"jobid={training.job}", "timelimit=30")


def test_a_node_whose_processes_are_killed_ends_all_and_requeues_the_job(training: Training) -> None:
    training.makes_progress()
    for process in training.daemons.processes("n2"):
        if process.name() != "slurmstepd":
            process.send_signal(signal.SIGKILL)
    training.is_requeued()
    training.is_released()


def test_it_stops_when_asked_to_with_the_losses_of_a_run_left_in_peace(training: Training, tmp_path: Path) -> None:
    account = training.account
    training.makes_progress()
    (account.run / "STOP").touch()
    training.wait("its end", lambda: training.state == "CANCELLED", 60)
    training.wait("the others' end", lambda: account.states()["evaluate"] == {"CANCELLED"}, 60)
    training.wait("the end of its processes", lambda: not training.daemons.processes(), 30)
    assert "to go on: ppcl submit RECIPE --from finetune" in account.log("finetune")
    expect_undisturbed(training, tmp_path, "finetune", "--variant", "small")


def test_what_it_cannot_go_on_with_is_refused_before_the_queue(training: Training) -> None:
    account, before = training.account, training.account.chain()
    recipe = yaml.safe_load(account.recipe.read_text())
    recipe["finetune"]["velocity_weight"] = 0.5
    account.recipe.write_text(yaml.safe_dump(recipe))
    printed = account.shell("ppcl submit my.yaml --from finetune", code=2)
    assert "error: recipe key 'finetune.velocity_weight' is not what " in printed
    assert account.chain() == before
