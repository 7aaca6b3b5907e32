"""The `ppcl-data` command: from a folder of images and captions to the shards that `ppcl` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppcl_ds import console
from ppcl_ds.recipe import load_recipe

app = typer.Typer(
    help="Prepare text-image pairs: first `shard`, then `encode`; both read the `data` section of a recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # reflows the docstrings
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The YAML recipe, such as recipes/digits.yaml.")]


@app.command()
def shard(recipe: RecipePath) -> None:
    """Pack images and captions into tar shards.

    Reads every png, jpg, jpeg and webp below `data.source`, each with its caption in a .txt file of the same name,
    and writes `data.shards`/raw/: the original bytes, split into train and heldout by a stable hash of the file name.
    Run again, it does nothing, unless the recipe has changed.
    """
    from data_tools.shard import shard as write_shards

    write_shards(load_recipe(recipe).data)


@app.command()
def encode(recipe: RecipePath) -> None:
    """Encode the shards once, so that training never runs an image or text encoder.

    Reads `data.shards`/raw/ and writes `data.shards`/encoded/: for every sample its latents and prompt embeddings, as
    `data.images` and `data.captions` say. Interrupted, it goes on at the shard where it stopped; run again, it encodes
    only what has changed.
    """
    from data_tools.encode import encode as write_encoded

    write_encoded(load_recipe(recipe).data)


def main() -> None:
    """Run the command line."""
    console.run(app)


if __name__ == "__main__":
    main()
