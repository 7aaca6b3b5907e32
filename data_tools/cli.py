"""The `ppcl-data` command: from images and captions, wherever they lie, to the shards that `ppcl` reads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ppcl_ds import console, early
from ppcl_ds.errors import UserError
from ppcl_ds.options import Changes, RecipePath, program
from ppcl_ds.recipe import load_recipe

if TYPE_CHECKING:
    from data_tools.summary import Summary

app = program(
    "Prepare text-image pairs: `shard`, then `encode`; both read the `data` section of a recipe. "
    "`index`, `verify` and `inspect` look after shards, whoever wrote them.",
    rich_markup_mode="markdown",  # reflows the docstrings
)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of shards, or one with raw/ and encoded/.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes; each works on a shard. 0: one for each core, at most 4.")]
Json = Annotated[str, typer.Option("--json", metavar="FILE", help="Write the summary as JSON; `-`: to stdout.")]


@app.command()
def shard(
    recipe: RecipePath,
    update: Annotated[
        bool, typer.Option("--update", help="Take what is new or has changed in the source; keep the rest.")
    ] = False,
    workers: Workers = 0,
    json: Json = "",
    changes: Changes = None,
) -> None:
    """Pack images and captions into tar shards.

    Reads `data.source`, folders, tables or webdataset shards, and writes `data.shards`/raw/: the original bytes,
    split into train and heldout by a stable hash of the file name. Samples that cannot be used are skipped and named.
    Interrupted, it goes on at the shard where it stopped. Run again, it does nothing, unless the recipe has changed,
    but says whether the source has.
    """
    loaded = load_recipe(recipe, changes or ())
    early.begin(loaded, "shard", "looks at the source")
    from data_tools.shard import shard as write_shards

    _tell(json, lambda: write_shards(loaded.data, _processes(workers), update))


@app.command()
def encode(
    recipe: RecipePath,
    keep_images: Annotated[bool, typer.Option("--keep-images", help="Store the images beside their latents.")] = False,
    part: Annotated[str, typer.Option(metavar="I/N", help="Encode every n-th shard, such as 2/8.")] = "",
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with encoders of its own.")] = 1,
    json: Json = "",
    changes: Changes = None,
) -> None:
    """Encode the shards once, so that training never runs an image or text encoder.

    Reads `data.shards`/raw/ and writes `data.shards`/encoded/: for every sample its latents and its text, as the VAE
    and the text encoders of the teacher's pipeline make them. A Slurm job array or torchrun divides the shards over
    its tasks; whichever is the last writes the index. Interrupted, it goes on at the shard where it stopped; run
    again, it encodes only what has changed.
    """
    loaded = load_recipe(recipe, changes or ())
    early.begin(loaded, "encode", "opens the pipeline")
    from data_tools.encode import encode as write_encoded

    _tell(json, lambda: write_encoded(loaded, keep_images, workers, part))


@app.command()
def index(
    shards: Annotated[list[str], typer.Argument(metavar="SHARDS...", help="A folder; or tars, patterns, addresses.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: index.json beside the shards.")] = None,
    workers: Workers = 0,
    json: Json = "",
) -> None:
    """Write the index of shards that someone else wrote.

    Where every sample lies, its latents' shape, how long each shard is, its checksum, and what is damaged in it. Brace
    patterns (`train-{000000..000123}.tar`), `http(s)://` and `pipe:` addresses are understood.
    """
    early.say("index: reads the shards")
    from data_tools.index import index as write_index

    _tell(json, lambda: write_index(shards, out, _processes(workers)))


@app.command()
def verify(
    folder: Folder,
    repair: Annotated[Path | None, typer.Option(metavar="DIR", help="A new folder for clean copies.")] = None,
    workers: Workers = 0,
    json: Json = "",
) -> None:
    """Look for damage in every byte of the shards; exit code 1 if there is any.

    Decodes every image, caption and tensor, compares all with the index, and lists each problem. With `--repair`,
    copies that hold the good samples only, and their index, go to another folder; the originals stay as they are.
    """
    early.say("verify: reads the shards")
    from data_tools.verify import verify as look

    _tell(json, lambda: look(folder, repair, _processes(workers)))


@app.command()
def inspect(
    folder: Folder,
    sheet: Annotated[Path | None, typer.Option(metavar="FILE", help="A contact sheet, .html or .png.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples on the sheet, evenly spread.")] = 64,
    workers: Workers = 0,
    json: Json = "",
) -> None:
    """Show what is in the shards: sizes, captions, latents, what is lacking, and a contact sheet."""
    early.say("inspect: reads the shards")
    from data_tools.inspect import inspect as look

    _tell(json, lambda: look(folder, sheet, samples, _processes(workers)))


def _processes(workers: int) -> int:
    from data_tools.work import usual_workers

    return workers or usual_workers()


def _tell(json: str, work: Callable[[], Summary]) -> None:
    """Do the work and print its summary; with `--json -`, all but the JSON goes to stderr."""
    with redirect_stdout(sys.stderr) if json == "-" else nullcontext():
        try:
            summary = work()
        except OSError as fault:  # a disk is full, a folder cannot be written
            what = f"{fault.filename}: {fault.strerror}" if fault.filename else str(fault)
            raise UserError(f"{what}; put that right and run the same command again: it goes on where it was") from None
        summary.show()
    summary.write(json)
    if summary.found:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    console.run(app)


if __name__ == "__main__":
    main()
