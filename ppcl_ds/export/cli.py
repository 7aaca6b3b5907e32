"""The commands that read models of others: import, lora remap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppcl_ds.export import SHARD_SIZE

app = typer.Typer()
lora_app = typer.Typer(help="LoRAs of the teacher, for its variants.", no_args_is_help=True)
app.add_typer(lora_app, name="lora")

ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest weights file; about as much memory is needed.")]


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(metavar="OPPO_FOLDER", help="A published Qwen-Image: a pipeline or transformer folder."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    max_shard_size: ShardSize = SHARD_SIZE,
) -> None:
    """Turn a width-pruned Qwen-Image that PPCL's authors published into one that loads without their code.

    Theirs have single_stream_index, ffn_proj_index and ehs_proj_index in config.json. The result computes the same, and
    carries its own modelling file: load it with trust_remote_code=True, or with ppcl_ds.load_pipeline.
    """
    from ppcl_ds.export.model_folder import shard_bytes
    from ppcl_ds.export.published import import_published

    import_published(source, out, shard_bytes(max_shard_size))


@lora_app.command()
def remap(
    lora: Annotated[Path, typer.Argument(metavar="LORA", help="A .safetensors file, trained on the teacher.")],
    plan: Annotated[Path, typer.Option(metavar="PLAN", help="The plan.yaml that the variant was made by.")],
    variant: Annotated[str, typer.Option(metavar="NAME", help="The variant that is to use the LoRA.")],
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder with the teacher's config.json; needed for families with several lists of blocks (FLUX).",
            show_default="the run's own, if it is there",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to write.", show_default="LORA-NAME.safetensors")
    ] = None,
) -> None:
    """Renumber the blocks of a LoRA for a variant, in the layout that the file has.

    What belongs to a block or a part that a unit replaces is dropped and listed: the LoRA was not trained on the unit.
    """
    from ppcl_ds.export.lora import remap

    remap(lora, plan, variant, teacher, out)
