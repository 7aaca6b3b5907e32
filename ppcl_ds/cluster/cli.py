"""The commands of a Slurm cluster: submit, status, cancel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppcl_ds import early
from ppcl_ds.cluster import slurm
from ppcl_ds.errors import UserError
from ppcl_ds.options import Changes
from ppcl_ds.recipe import load_recipe

app = typer.Typer()

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder, as the recipe names it.")]


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe; its section `cluster` is for this.")],
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="STEP", help="Do this step and all that follow, whether done or not."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, write the scripts, print sbatch's lines; queue nothing.")
    ] = False,
    changes: Changes = None,
) -> None:
    """Queue the whole road as Slurm jobs: encode, probe, merge, plan, distill, finetune, consolidate, evaluate.

    Each job starts when those before it have ended well; what is done already is left out. Whatever can be known to be
    wrong is refused before anything is queued. Recipe, plan and scripts as used, logs, versions and job numbers lie in
    RUN/slurm/. A file RUN/STOP ends the run after its next step; this command removes it.
    """
    loaded = load_recipe(recipe, changes or ())
    slurm.need_slurm()
    early.say("submit: checks recipe, teacher, plan and shards")
    from ppcl_ds.cluster.submit import submit

    submit(recipe, loaded, start, dry_run, changes or ())


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe, or a run folder.")],
    watch: Annotated[bool, typer.Option("--watch", help="Redraw it every two seconds, until Ctrl-C.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it for programs instead.")] = False,
    changes: Changes = None,
) -> None:
    """Say how far a run is: each step of the road, what runs, what failed and why, and the command that comes next.

    Of a training: step, loss, samples a second, time left and the newest checkpoint. Of a run that was submitted to
    Slurm, also how its jobs are. Reads files alone, so it can be asked on any machine that sees the run folder.
    """
    if watch and json:
        raise UserError("--watch and --json: give one of them at a time")
    from ppcl_ds.cluster.status import status

    status(run, watch, json, changes or ())


@app.command()
def cancel(run: RunFolder) -> None:
    """Cancel what is left of a run's jobs."""
    from ppcl_ds.cluster.submitted import cancel

    cancel(run)
