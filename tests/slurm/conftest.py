"""The Slurm that all tests here share, and accounts on it as users have them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm.daemons import Daemons

HERE = Path(__file__).parents[2]
PAGE = HERE / "docs" / "cluster.md"
SITE = "export DS_ACCELERATOR=cpu GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1\n"
CLUSTER = {
    "processes_per_node": 1,
    "gpus": False,
    "time": "10",
    "notice": 30,
    "encode_tasks": 2,
    "probe_parts": 2,
    "scripts": "my-slurm",
}
RAN: set[str] = set()
"""Names of the page's blocks that have been run."""


def blocks() -> dict[str, str]:
    """The commands of the page: name in the line ```` ```bash NAME ```` -> lines."""
    return dict(re.findall(r"^```bash (\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))


class Account:
    """A home folder on the cluster, with a checkout in it; its name needs quoting, as that of its run does.

    Args:
        run: name of the run folder in `runs/`; the page calls it `my`.
    """

    def __init__(self, home: Path, daemons: Daemons, run: str) -> None:
        self.home, self.daemons, self.run, self.recipe = home, daemons, home / "runs" / run, home / "my.yaml"
        home.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "slurm", "recipes"):
            source = HERE / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, home / name)
        (home / ".venv").symlink_to(HERE / ".venv")

    def types(self, name: str, code: int = 0) -> str:
        """Run a block of the page; returns what it printed."""
        RAN.add(name)
        lines = blocks()[name].replace("runs/my", self.quoted_run)
        return self.shell(lines.replace("my-distill", shlex.quote(f"{self.run.name}-distill")), code)

    @property
    def quoted_run(self) -> str:
        """The run folder as it is typed at home."""
        return shlex.quote(f"runs/{self.run.name}")

    def shell(self, lines: str, code: int = 0) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", lines],
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=300,
            env=self.daemons.environment | {"PATH": f"{HERE}/.venv/bin:{os.environ['PATH']}", "COLUMNS": "200"},
        )
        assert done.returncode == code, f"{lines}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def edits(self, recipe: dict[str, Any]) -> None:
        """What the page asks to edit, edited."""
        (self.home / "my-slurm" / "site.env").open("a").write(SITE)
        self.recipe.write_text(yaml.safe_dump(recipe))

    def chain(self) -> dict[str, str]:
        """Step -> job, of the newest chain."""
        listed = yaml.safe_load((self.run / "slurm" / "jobs.json").read_text())
        return {each["step"]: each["job"] for each in listed}

    def states(self) -> dict[str, set[str]]:
        """Step -> states of its job or of the tasks of its array."""
        jobs = self.daemons.states()
        return {step: {state for job, state in jobs if job == number} for step, number in self.chain().items()}

    def waits(self, seconds: float = 600) -> None:
        """Until the chain has ended well."""
        end = time.monotonic() + seconds
        while True:
            states = self.states()
            flat = set().union(*states.values())
            if flat == {"COMPLETED"}:
                return
            assert flat <= {"PENDING", "RUNNING", "COMPLETING", "COMPLETED", "CONFIGURING"}, self.everything()
            assert time.monotonic() < end, self.everything()
            time.sleep(0.5)

    def log(self, step: str) -> str:
        return "".join(path.read_text() for path in sorted((self.run / "slurm" / "logs").glob(f"{step}-*.out")))

    def everything(self) -> str:
        """For a test that fails: states and the ends of all logs."""
        logs = sorted((self.run / "slurm" / "logs").rglob("*.out"))
        return "\n".join([str(self.states()), *(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs)])


@pytest.fixture(scope="session")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """Fails where Slurm cannot be started: nothing here is skipped."""
    started = Daemons(tmp_path_factory.mktemp("slurm") / "daemons")
    yield started
    started.stop()
    assert not started.processes()
