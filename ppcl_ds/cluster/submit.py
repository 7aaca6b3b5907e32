"""`ppcl submit`: the chain of a run as Slurm jobs, each started when those before it have ended well.

RUN/slurm/
  recipe.yaml, plan.yaml        as they were when the chain was submitted; the jobs read this recipe, and RUN/plan.yaml
  *.sbatch, ranks.sh, site.env  the scripts that the jobs run
  environment.json              versions, topology, git revision
  jobs.json                     the newest chain: step and job number
  logs/STEP-JOB.out             what a job printed; logs/STEP-JOB/start-N/NODE/ has a file for each rank
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ppcl_ds.atomic import atomic_write
from ppcl_ds.cluster import slurm
from ppcl_ds.cluster.refusals import check, nodes_of, parts_of, variants_of
from ppcl_ds.cluster.submitted import Queued, folder_of, read_chain, write_chain
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.recipe_file import as_one_file
from ppcl_ds.steps import STEPS, Step, due, steps
from ppcl_ds.watch.preemption import stop_file

_SCRIPTS = ("*.sbatch", "ranks.sh", "site.env")
_PACKAGES = ("ppcl-ds", "torch", "deepspeed", "diffusers", "transformers", "accelerate", "numpy")


def submit(path: Path, recipe: Recipe, start: str | None, dry_run: bool, changes: Sequence[str] = ()) -> None:
    """Check, write down and queue what a run still lacks, or all from one step on.

    Args:
        changes: of the recipe, see `load_recipe`; the jobs read it with them.

    Raises:
        UserError: something is wrong with the request; nothing is queued then.
    """
    slurm.need_slurm()
    parts = parts_of(recipe)
    _, *jobs = steps(recipe, variants_of(recipe), parts)  # shards are there already
    chosen = due(jobs, start)
    if not chosen:
        print(f"{recipe.run}: every step is done; --from STEP does one again, and all that follow")
        return
    queued = [each.job for each in read_chain(recipe.run)]
    if busy := [job.number for job in slurm.jobs_of(queued) if not job.over]:
        raise UserError(f"{recipe.run} has jobs in the queue ({', '.join(busy)}); run `ppcl cancel {recipe.run}` first")
    check(recipe, chosen)  # after the queue, as a job of it holds the training's folder
    folder = folder_of(recipe.run)
    try:
        _write(as_one_file(path, [*changes, f"cluster.probe_parts={parts}"]), recipe, folder)
    except OSError as fault:
        raise UserError(f"{fault.filename or folder} cannot be written ({fault.strerror}); nothing is queued") from None
    orders = {step.name: _order(recipe, step, folder.resolve()) for step in chosen}
    for order in orders.values():
        slurm.test_only(order)
    if dry_run:
        for order in orders.values():
            print(shlex.join(["sbatch", *order]))
        print(f"recipe, shards, topology and Slurm's options are in order; {folder} has the scripts, nothing is queued")
        return
    stop_file(recipe.run).unlink(missing_ok=True)
    _show(chosen, _queue(recipe.run, chosen, orders))
    print(f"ppcl status {shlex.quote(str(recipe.run))} says how they are, ppcl cancel ends them")


def _write(said: str, recipe: Recipe, folder: Path) -> None:
    """Everything that the jobs will read, and what it will be good to know later."""
    sources = [file for pattern in _SCRIPTS for file in sorted(recipe.cluster.scripts.glob(pattern))]
    needed = [f"{name}.sbatch" for name in STEPS] + ["ranks.sh", "site.env"]
    if lost := [name for name in needed if name not in {file.name for file in sources}]:
        raise UserError(f"cluster.scripts: {recipe.cluster.scripts} has no {lost[0]}; copy the whole folder that ships")
    files = {file.name: file.read_bytes() for file in sources} | {"recipe.yaml": said.encode()}
    if recipe.plan_file.exists():
        files["plan.yaml"] = recipe.plan_file.read_bytes()
    files["environment.json"] = (json.dumps(_environment(recipe), indent=1) + "\n").encode()
    (folder / "plan.yaml").unlink(missing_ok=True)  # of an earlier chain
    for name, content in files.items():
        atomic_write(folder / name, content)
    (folder / "logs").mkdir(exist_ok=True)


def _environment(recipe: Recipe) -> dict[str, object]:
    return {
        "versions": {name: version(name) for name in _PACKAGES}
        | {"python": platform.python_version(), "slurm": slurm.version()},
        "topology": recipe.topology.model_dump() | {"nodes": nodes_of(recipe)},
        "git": _revision(Path(__file__).parent),
        "command": shlex.join(sys.argv),
        "folder": str(Path.cwd()),
    }


def _revision(folder: Path) -> str | None:
    """Of the checkout that a folder is in, with `-dirty` where it has been changed; None if it is in none."""
    if not shutil.which("git"):
        return None
    words = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
    return done.stdout.strip() or None


def _order(recipe: Recipe, step: Step, folder: Path) -> list[str]:
    """sbatch's arguments for a step, what it waits for left out; options of the recipe come last, and so decide."""
    cluster = recipe.cluster
    nodes = nodes_of(recipe) if step.ranks else 1
    output = str(folder / "logs").replace("%", "%%") + f"/{step.name}-{'%A_%a' if step.array else '%j'}.out"
    options = [
        f"--job-name={recipe.run.name}-{step.name}",
        f"--output={output}",
        f"--time={cluster.time}",
        f"--nodes={nodes}",
        "--kill-on-invalid-dep=yes",
        "--export=ALL",
    ]
    if step.array:
        options.append(f"--array={step.array}")
    if cluster.gpus:
        options.append(f"--gpus-per-node={recipe.topology.world // nodes if step.ranks else 1}")
    if step.ranks:
        options.append(f"--signal=B:USR1@{cluster.notice}")
    script = folder / f"{step.name}.sbatch"
    return [*options, *cluster.options, str(script), str(folder / "recipe.yaml"), *step.variants]


def _queue(run: Path, chosen: Sequence[Step], orders: dict[str, list[str]]) -> dict[str, str]:
    """Queue the steps, each after those it waits for; all or none."""
    environment = {"PPCL_SLURM": str(folder_of(run).resolve()), "PPCL_PYTHON": sys.executable}
    jobs: dict[str, str] = {}
    chain: list[Queued] = []
    try:
        for step in chosen:
            waits = [jobs[name] for name in step.needs if name in jobs]
            dependency = [f"--dependency=afterok:{':'.join(waits)}"] if waits else []
            jobs[step.name] = slurm.submit([*dependency, *orders[step.name]], environment)
            chain.append(Queued(step=step.name, job=jobs[step.name]))
            write_chain(run, chain)
    except BaseException:
        slurm.cancel(list(jobs.values()))
        raise
    return jobs


def _tasks(step: Step) -> int:
    first, _, last = step.array.partition("-")
    return int(last) - int(first) + 1 if step.array else 1


def _show(chosen: Sequence[Step], jobs: dict[str, str]) -> None:
    table = Table("step", "job", "tasks", "after")
    for step in chosen:
        waits = ", ".join(jobs[name] for name in step.needs if name in jobs)
        table.add_row(escape(step.name), jobs[step.name], str(_tasks(step)), waits)
    Console().print(table)
