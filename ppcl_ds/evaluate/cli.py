"""The commands that look at models: evaluate, sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppcl_ds import early, launch, memory
from ppcl_ds.errors import UserError
from ppcl_ds.options import Changes, RecipePath
from ppcl_ds.recipe import load_recipe

app = typer.Typer()

_EVALUATE_LESS = "lower evaluate.batch_size, or measure on the CPU with CUDA_VISIBLE_DEVICES="


@app.command()
def evaluate(
    recipe: RecipePath,
    read_scores: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET/MODEL=FILE",
            help="Only take a result file of the set's own scorer into report and cards; repeat for several.",
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Only time teacher and variants end to end, and write speed.json.")
    ] = False,
    changes: Changes = None,
) -> early.Done:
    """Teacher, variants and undistilled variants side by side, on the same noise.

    Writes samples.png, samples/, report.json and report.html into the run folder, and the figures into the models'
    cards.

    Prompt sets (evaluate.sets) are drawn first, by teacher and variants, on all GPUs of this machine or all processes
    that torchrun or Slurm have started, and laid out in evaluate/ as their benchmarks' scorers read them. Stopped, it
    goes on where it was.
    """
    loaded = load_recipe(recipe, changes or ())
    if read_scores and speed:
        raise UserError("--read-scores and --speed: give one of them at a time")
    _ = loaded.teacher.folder  # refused if it is not there, or fetched from the hub
    early.begin(loaded, "evaluate", "looks at teacher, variants and held-out data")
    from ppcl_ds.evaluate.evaluate import check, evaluate, take_scores

    if read_scores:
        take_scores(loaded, read_scores)
        return early.Done(loaded, "evaluate --read-scores")
    checked = check(loaded)
    if speed:
        from ppcl_ds.evaluate.speed import measure_speed

        if launch.is_first_rank():
            with memory.told("evaluate", _EVALUATE_LESS):
                measure_speed(loaded, checked.teacher, checked.drawn)
        return early.Done(loaded, "evaluate --speed")
    if loaded.evaluate.sets and (gpus := launch.gpus()) > 1:
        launch.on_ranks(gpus)
    with memory.told("evaluate", _EVALUATE_LESS):
        evaluate(checked)
    return early.Done(loaded, "evaluate")


@app.command()
def sample(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A diffusers pipeline folder, such as a variant's."),
    ],
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeat for several images.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where to write the images.")] = Path("samples.png"),
    seed: Annotated[int, typer.Option(min=0, help="Of the noise, which is the same for every prompt.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps.", show_default="the pipeline's own")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="Guidance scale; Qwen-Image pipelines use none unless told (4 is usual).",
            show_default="the pipeline's own",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Height and width in pixels.", show_default="the pipeline's own"),
    ] = None,
) -> None:
    """Draw images with the teacher or with a variant, one column a prompt; of a clip, the frame in its middle.

    It is drawn with as diffusers does. A GPU is used if there is one.
    """
    early.check_there(model, "model")
    early.say(f"sample: loads {model}")
    from ppcl_ds.evaluate.sample import sample

    sample(model, prompt, out, seed=seed, steps=steps, guidance=guidance, size=size)
