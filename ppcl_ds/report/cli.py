"""`ppcl report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppcl_ds.record import open_any

app = typer.Typer()


@app.command()
def report(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_RECIPE", help="A run folder, or its recipe.")],
) -> None:
    """Make the page of a whole run, RUN/report.html: verdict, pictures, figures, cost, plan, probe, training.

    It is one file that needs no network and no other file. probe, plan, distill, finetune, consolidate and evaluate
    renew it; what a run does not have yet is left out, with the command that makes it.
    """
    recipe = open_any(source)
    print(f"reading {recipe.run}", flush=True)  # what the page is made with takes seconds to import
    from ppcl_ds.report.page import write_page

    print(f"wrote {write_page(recipe)}")
