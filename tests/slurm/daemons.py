"""A real Slurm of two nodes on this host: munge, the controller and two node daemons, gone again at the end.

Everything they write lies in one folder. The daemons see a host file of their own, in which the nodes have names, as on
a cluster; what the jobs run inherits it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

NODES = ("n1", "n2")
CORES = 2
"""That each node says it has, whatever this host has."""
_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv")


class Daemons:
    """The running daemons; `stop` ends them and everything they started.

    Args:
        folder: for their configuration, sockets, logs and state.

    Raises:
        RuntimeError: something is not installed, or does not come up.
    """

    def __init__(self, folder: Path) -> None:
        if missing := [name for name in _NEEDED if not shutil.which(name)]:
            raise RuntimeError(f"{', '.join(missing)}: not installed; `make test-slurm` installs slurm-wlm and munge")
        self.folder = folder
        folder.mkdir(mode=0o755)
        (folder / "state").mkdir()
        self.hosts = folder / "hosts"
        self.hosts.write_text(Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {name}\n" for name in NODES))
        self.conf = folder / "slurm.conf"
        self.conf.write_text(self._configuration())
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        self.started: list[subprocess.Popen[bytes]] = []
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
            for name in NODES:
                self._start(f"slurmd-{name}", "slurmd", "-D", "-N", name, "-f", str(self.conf))
            self.wait_for("both nodes idle", lambda: self._nodes() == ["idle"] * len(NODES), 60)
        except BaseException:
            self.stop()
            raise

    def _configuration(self) -> str:
        state, ports = self.folder / "state", _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={CORES} State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        return f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=1
KillWait=15
InactiveLimit=0
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/slurmd-%n
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

    def _start_munge(self) -> None:
        key, socket_file = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = [f"--{what}-file={self.folder}/munge.{what}" for what in ("key", "log", "pid", "seed")]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={socket_file}", *files)
        self.wait_for("munge's socket", socket_file.exists, 20)

    def _start(self, name: str, *command: str) -> None:
        """In a mount namespace in which /etc/hosts is our own; it ends with us, even if we are killed."""
        script = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
        with (self.folder / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                [
                    "setpriv",
                    "--pdeathsig",
                    "TERM",
                    "unshare",
                    "--mount",
                    "sh",
                    "-c",
                    script,
                    "sh",
                    str(self.hosts),
                    *command,
                ],
                stdout=out,
                stderr=out,
                env=self.environment,
                start_new_session=True,
            )
        self.started.append(process)

    def _nodes(self) -> list[str]:
        done = subprocess.run(
            ["sinfo", "--Node", "--noheader", "--format=%T"], capture_output=True, text=True, env=self.environment
        )
        return done.stdout.split()

    def wait_for(self, what: str, is_so: Callable[[], Any], seconds: float) -> Any:
        """Wait until it is so, and return what it says.

        Raises:
            RuntimeError: it is not so in time; the daemons' last words are in the message.
        """
        end = time.monotonic() + seconds
        while not (found := is_so()):
            if time.monotonic() > end:
                raise RuntimeError(f"waited {seconds:g} s for {what}\n{self.last_words()}")
            time.sleep(0.2)
        return found

    def last_words(self) -> str:
        """The ends of all logs."""
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def run(self, *command: str | Path) -> str:
        """A Slurm command, as an administrator types it."""
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, env=self.environment, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self) -> list[tuple[str, str]]:
        """Job (of an array task: its array) and state, of all that the controller still knows."""
        listed = self.run("squeue", "--noheader", "--array", "--states=all", "--format=%F %T")
        return [(job, state) for job, state in map(str.split, listed.splitlines())]

    def ended(self, *jobs: str) -> bool:
        """Whether none of these jobs will run again."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        return all(state in over for job, state in self.states() if job in jobs)

    def processes(self, node: str = "") -> list[psutil.Process]:
        """Everything that runs because a job does, on one node or all: Slurm marks it by its environment."""
        return [
            process
            for process, environment in self._ours()
            if "SLURM_JOB_ID" in environment and (not node or environment.get("SLURMD_NODENAME") == node)
        ]

    def _ours(self) -> list[tuple[psutil.Process, dict[str, str]]]:
        """Daemons, their helpers and what they started."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:  # it is gone, or the kernel's
                continue
            if environment.get("SLURM_CONF") == str(self.conf):
                found.append((process, environment))
        return found

    def stop(self) -> None:
        """End all jobs, then the daemons; whatever does not end by itself is killed."""
        subprocess.run(["scancel", "--user=root"], capture_output=True, env=self.environment, timeout=30)
        psutil.wait_procs(self.processes(), timeout=20)
        for process in reversed(self.started):
            process.terminate()
        for process in reversed(self.started):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for left, _ in self._ours():
            left.kill()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
