"""The commands that write models for others, and read theirs: consolidate, import, lora remap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppcl_ds import early
from ppcl_ds.errors import UserError
from ppcl_ds.export import SHARD_SIZE, check_lora
from ppcl_ds.options import Changes, group
from ppcl_ds.recipe import open_run

app = typer.Typer()
lora_app = group("LoRAs of the teacher, for its variants.")
app.add_typer(lora_app, name="lora")

_DTYPES, _QUANTISED = "fp32|bf16|fp16", "int8|fp8|nf4"
_TOOLS, _GGUF = "comfyui|comfyui-fp8|comfyui-int8|sd.cpp", "F16|BF16|Q8_0|Q5_0|Q4_0"
_STRATEGIES = "drop|nearest"
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest weights file; about as much memory is needed.")]


@app.command()
def consolidate(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_RECIPE", help="A recipe, or a run folder: then its training's recipe.")
    ],
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Variant to write; repeat for several.", show_default="all"),
    ] = None,
    plug: Annotated[
        list[str] | None,
        typer.Option(
            metavar="UNIT=on|off",
            help="Plug a unit of the library into the variant, or put the teacher's blocks back; repeat for several. "
            "Needs one --variant, and --out.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the one variant into this folder.", show_default="pruned/VARIANT"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar=_DTYPES, help="Dtype of the weights.", show_default="the teacher's files'"),
    ] = None,
    max_shard_size: ShardSize = SHARD_SIZE,
    single_file: Annotated[
        str | None,
        typer.Option(
            metavar=_TOOLS,
            help="Also write VARIANT.safetensors, named, and quantised, as this tool wants it.",
        ),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(
            metavar=_GGUF,
            help="Also write VARIANT-TYPE.gguf, for ComfyUI unless --single-file names another tool.",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar=_QUANTISED,
            help="Quantise the weights of linear layers, with torchao or bitsandbytes, and measure what that costs. "
            "Needs the whole model in memory.",
        ),
    ] = None,
    changes: Changes = None,
) -> early.Done:
    """Write trained variants as diffusers folders, from the newest checkpoint: pruned/VARIANT in the run folder.

    Each folder has transformer/, a model card, checksums, and the rest of the pipeline if the teacher is a pipeline
    folder. A depth-only variant loads with the stock class's from_pretrained; ppcl_ds is not needed. Weights are
    streamed, a file at a time; a folder appears whole or not at all.
    """
    recipe = open_run(source, changes or ())
    for option, value, known in (
        ("--dtype", dtype, _DTYPES),
        ("--single-file", single_file, _TOOLS),
        ("--gguf", gguf, _GGUF),
        ("--quantize", quantize, _QUANTISED),
    ):
        early.check_choice(option, value, known.split("|"))
    _ = recipe.teacher.folder  # refused if it is not there, or fetched from the hub
    early.check_variants(recipe.plan_file, variant or ())
    early.begin(recipe, "consolidate", "opens teacher and checkpoint")
    from ppcl_ds.export.consolidate import Form, consolidate

    form = Form.checked(dtype, max_shard_size, single_file, gguf, quantize)
    consolidate(recipe, variant or [], form, plug or [], out)
    return early.Done(recipe, "consolidate", out is None)


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER_OR_FILE",
            help="A width-pruned Qwen-Image of PPCL's authors: a pipeline or transformer folder; or a single file.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    base: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of a single file: the folder of the model that it was made from."),
    ] = None,
    max_shard_size: ShardSize = SHARD_SIZE,
) -> None:
    """Turn a pruned model that others published into a folder that loads without their code.

    PPCL's authors' Qwen-Images have single_stream_index, ffn_proj_index and ehs_proj_index in config.json. The result
    computes the same, and carries its own modelling file: load it with trust_remote_code=True, or with
    ppcl_ds.load_pipeline. A single .safetensors file, as for ComfyUI, may have fewer blocks than the model of --base;
    the result is of the stock class.
    """
    early.check_there(source, "model")
    if base is None and not source.is_dir():
        raise UserError(f"{source}: a single file needs --base, the folder of the model that it was made from")
    early.say(f"import: reads {source}")
    from ppcl_ds.export.model_folder import shard_bytes

    if source.is_dir():
        from ppcl_ds.export.published import import_published

        import_published(source, out, shard_bytes(max_shard_size))
        return
    from ppcl_ds.export.foreign import import_file

    assert base is not None, "as checked above"
    import_file(source, base, out, shard_bytes(max_shard_size))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that ppcl consolidate wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one, if it has to be made.")] = False,
) -> None:
    """Upload a consolidated folder to the Hugging Face hub, once its checksums are right.

    The account is the one of `hf auth login` or HF_TOKEN; HF_ENDPOINT names another hub.
    """
    early.check_there(folder, "folder")
    early.say(f"push: looks at {folder}")
    from ppcl_ds.export.push import push

    push(folder, repository, private)


@lora_app.command()
def remap(
    lora: Annotated[
        Path, typer.Argument(metavar="LORA", help="A .safetensors file, trained on the teacher; or a folder of them.")
    ],
    plan: Annotated[Path, typer.Option(metavar="PLAN", help="The plan.yaml that the variant was made by.")],
    variant: Annotated[str, typer.Option(metavar="NAME", help="The variant that is to use the LoRA.")],
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The teacher's pipeline folder; configurations are enough.",
            show_default="the run's own, if it is there",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to write.", show_default="LORA-NAME.safetensors")
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            metavar=_STRATEGIES,
            help="What becomes of the block that a depth unit started from: dropped, or given to the unit.",
        ),
    ] = "drop",
) -> None:
    """Renumber the blocks of LoRAs for a variant, in the layout that each file has.

    What belongs to a block or a part that a unit replaces is dropped and listed: the LoRA was not trained on the unit.
    """
    early.check_choice("--strategy", strategy, _STRATEGIES.split("|"))
    check_lora(lora)
    early.check_variants(plan, [variant])
    early.say("lora remap: opens the teacher's configuration")
    from ppcl_ds.export.lora import remap

    remap(lora, plan, variant, teacher, out, strategy)
