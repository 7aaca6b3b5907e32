"""The command that says what is served of a teacher's family: families."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def families(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Part of a class's or a family's name.")] = "",
) -> None:
    """Say what is served of each transformer class of diffusers, and with NAME, why the rest is not.

    Depth: blocks can be taken out. Text, ffn, narrow: a block's text stream or feed-forward can become a linear, a
    feed-forward can lose hidden channels. Single file: written as ComfyUI reads it. LoRA: renumbered for a variant.
    Partly: not with every configuration, or not block by block. Measured on tiny models; docs/families.md says how.
    """
    from ppcl_ds.teacher.families import print_families

    print_families(name)
