"""The command that begins a run: init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def init(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE_FOLDER", help="The teacher: a diffusers pipeline.")],
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
    from ppcl_ds.start.init import init

    init(pipeline, source, out, gpus, gpu_memory)
