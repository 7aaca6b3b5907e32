"""The commands about recipes: init, recipe show, recipe schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppcl_ds import early
from ppcl_ds.options import Changes, RecipePath, group

app = typer.Typer()
recipe_app = group("What a recipe says, and what it could say.")
app.add_typer(recipe_app, name="recipe")


@app.command()
def init(
    pipeline: Annotated[
        Path, typer.Argument(metavar="PIPELINE_FOLDER", help="The teacher: a diffusers pipeline, or its id on the hub.")
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Images or clips with captions, or captions alone: a folder, a table or shards."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="What to write.", show_default="the folder's name.yaml")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs of the whole run; 0: the CPU.", show_default="those of this machine")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, metavar="GB", help="Of each GPU.", show_default="this machine's")
    ] = None,
) -> None:
    """Write a recipe that runs, with a reason beside every value.

    Looks at the pipeline's configurations, at the first images and clips of the source and at the GPUs of this machine,
    or of the one that the options describe. No weights are read, and no recipe is overwritten.
    """
    early.say("init: looks at pipeline, source and GPUs")
    from ppcl_ds.start.init import init

    init(pipeline, source, out, gpus, gpu_memory)


@recipe_app.command()
def show(recipe: RecipePath, changes: Changes = None) -> None:
    """Print the recipe as a run will use it: bases and changes in, defaults filled in and marked.

    What is printed is a recipe itself. A comment says where a value comes from that the file does not have: `default`,
    `--set`, or the name of the base.
    """
    from ppcl_ds.start.view import show

    show(recipe, changes or [])


@recipe_app.command()
def schema() -> None:
    """Print the JSON schema of recipes, with which editors complete, check and explain keys.

    Such as `ppcl recipe schema > recipe.schema.json`, and `# yaml-language-server: $schema=recipe.schema.json` as the
    first line of a recipe beside it.
    """
    from ppcl_ds.start.view import print_schema

    print_schema()
