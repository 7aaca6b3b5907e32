"""One distillation on two nodes, to which everything happens in turn; its loss curve is that of a run left in peace."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import make_recipe
from tests.plans import ten_spans
from tests.slurm.conftest import CLUSTER, PAGE, RAN, Account, blocks
from tests.slurm.daemons import Daemons
from tests.slurm.training import Training, expect_undisturbed

pytestmark = pytest.mark.slurm

PLAN = ten_spans()
RUN = 'my "2nd" run\'s'
EVERY = 10
"""Steps between checkpoints."""


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory, daemons: Daemons, prepared: Callable[[str], Path]) -> Account:
    """With a chain that begins at distill, its jobs limited to a minute; more steps than it will ever take."""
    account = Account(tmp_path_factory.mktemp("home") / "ben's home", daemons, RUN)
    shutil.copytree(prepared("qwen"), account.run)
    account.types("prepare")
    recipe = make_recipe("qwen", Path("runs") / RUN)
    recipe["distill"] |= {"steps": 100000, "checkpoint_every": EVERY, "timeout": 60, "micro_batch": 8}
    account.edits(recipe | {"cluster": CLUSTER | {"time": "1", "notice": 5, "requeues": 9}})
    PLAN.save(account.run / "plan.yaml")
    account.shell("ppcl submit my.yaml")
    return account


@pytest.fixture(scope="module")
def distillation(account: Account) -> Training:
    return Training(account, "distill", [unit.name for unit in PLAN.units])


@pytest.mark.parametrize("limit", ["first", "second"])
def test_at_its_time_limit_it_writes_a_checkpoint_and_gets_in_line_again(distillation: Training, limit: str) -> None:
    distillation.wait("a start", lambda: distillation.state == "RUNNING")
    before = distillation.saved
    distillation.is_requeued(seconds=120)
    distillation.is_released()
    assert distillation.saved > before
    if limit == "second":  # from here on, other things happen to it
        distillation.daemons.run("scontrol", "update", f"jobid={distillation.job}", "timelimit=30")
    log = distillation.account.log("distill")
    assert f"time is up, and there is a checkpoint: requeue {1 if limit == 'first' else 2} of at most 9" in log
    assert f"stops after step {distillation.saved} (SIGUSR1), with a checkpoint" in log


def test_a_node_whose_processes_are_killed_ends_all_and_requeues_the_job(distillation: Training) -> None:
    step = distillation.makes_progress()
    for process in distillation.daemons.processes("n2"):
        if process.name() != "slurmstepd":
            process.send_signal(signal.SIGKILL)
    distillation.is_requeued()
    assert distillation.saved in (step, step + EVERY)
    account = distillation.account
    assert "distill: n2: the launcher was killed" in account.shell(f"ppcl status {account.quoted_run}")
    distillation.is_released()
    log = account.log("distill")
    assert "the ranks have failed (exit code 137), but have made a checkpoint since this start: requeue 3" in log


def test_a_signal_by_hand_does_what_the_time_limit_does(distillation: Training) -> None:
    distillation.makes_progress()
    distillation.account.types("signal")
    distillation.is_requeued()
    distillation.is_released()
    assert "time is up, and there is a checkpoint: requeue 4" in distillation.account.log("distill")


def test_a_node_that_is_lost_requeues_the_job(distillation: Training) -> None:
    distillation.makes_progress()
    distillation.daemons.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    distillation.is_requeued()
    distillation.daemons.run("scontrol", "update", "nodename=n2", "state=resume")
    distillation.is_released()


def test_status_says_how_it_is(distillation: Training) -> None:
    distillation.makes_progress()
    distillation.wait("a line of progress", lambda: " of 100000" in distillation.account.types("look"))
    assert "RUNNING" in distillation.account.types("look")


def test_a_stop_file_ends_the_run_and_what_waits_for_it(distillation: Training) -> None:
    account = distillation.account
    distillation.makes_progress()
    account.types("stop")
    distillation.wait("its end", lambda: distillation.state == "CANCELLED", 60)
    distillation.wait("the others' end", lambda: account.states()["evaluate"] == {"CANCELLED"}, 60)
    distillation.wait("the end of its processes", lambda: not distillation.daemons.processes(), 30)
    assert "to go on: ppcl submit RECIPE --from distill" in account.log("distill")
    assert "CANCELLED" in account.shell(f"ppcl status {account.quoted_run}")


def test_the_loss_curve_is_that_of_a_run_which_nothing_stopped(distillation: Training, tmp_path: Path) -> None:
    expect_undisturbed(distillation, tmp_path, "distill")


def test_it_gets_in_line_no_more_often_than_the_recipe_allows(account: Account) -> None:
    recipe = yaml.safe_load(account.recipe.read_text())
    recipe["cluster"]["requeues"] = 0
    account.recipe.write_text(yaml.safe_dump(recipe))
    account.types("go-on")
    assert not (account.run / "STOP").exists()
    again = Training(account, "distill", [unit.name for unit in PLAN.units])
    again.makes_progress()
    account.types("signal")
    again.wait("its end", lambda: again.state == "FAILED", 60)
    again.wait("the others' end", lambda: account.states()["evaluate"] == {"CANCELLED"}, 60)
    assert "requeued 0 times already, and cluster.requeues allows no more" in account.log("distill")


def test_it_goes_on_and_is_cancelled(distillation: Training) -> None:
    account = distillation.account
    account.types("go-on")
    assert "ppcl cancel" in account.shell("ppcl submit my.yaml", code=2)
    account.types("cancel")
    distillation.wait("the end", lambda: set().union(*account.states().values()) == {"CANCELLED"}, 60)
    distillation.wait("the end of all processes", lambda: not distillation.daemons.processes(), 30)


def test_every_command_of_the_page_has_been_run() -> None:
    """By the tests of this folder, of which this is the last."""
    assert re.findall(r"^```(\w*)", PAGE.read_text(), re.MULTILINE)[::2] == [
        "bash",
        "yaml",
        *["bash"] * (len(blocks()) - 1),
    ]
    assert set(blocks()) == RAN
