"""The `ppcl` command: one function a subcommand; the work is done in the folders.

Each step is imported when it is called, after the check of the recipe: help and a wrong key answer at once.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ppcl_ds import console, launch, memory
from ppcl_ds.cluster.cli import app as cluster_app
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import ACCELERATORS
from ppcl_ds.export.cli import app as export_app
from ppcl_ds.recipe import load_recipe
from ppcl_ds.shipped import shipped
from ppcl_ds.start.cli import app as start_app
from ppcl_ds.teacher.cli import app as teacher_app

app = typer.Typer(
    help="Shrink a diffusion transformer into a family of smaller ones. The road: [bold]ppcl-data shard[/] and "
    "[bold]encode[/], then [bold]ppcl probe[/], [bold]plan[/], [bold]distill[/], [bold]finetune[/], "
    "[bold]consolidate[/] and [bold]evaluate[/]. Every step reads the same recipe and writes into its run folder. "
    "[bold]ppcl demo[/] walks it all on real handwritten digits in a few minutes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(start_app)
app.add_typer(export_app)
app.add_typer(cluster_app)
app.add_typer(teacher_app)

DEMO_RECIPE = shipped("recipes/digits.yaml")
_EVALUATE_LESS = "lower evaluate.batch_size, or measure on the CPU with CUDA_VISIBLE_DEVICES="
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe, such as recipes/digits.yaml.")]


@app.command()
def probe(
    recipe: RecipeFile,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Read only the I-th of N parts of the samples, and keep its sums.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add up the sums of all parts and report.")] = False,
) -> None:
    """Find what the teacher could do without.

    Fits a linear probe to every block, measures how far chains of them stray (CKA and error), and writes
    probe/report.json, report.html and plots into the run folder. Needs encoded shards and the teacher.
    An array of jobs shares the work: each runs one --part, in any order and again if need be; then --merge.
    """
    loaded = load_recipe(recipe)
    from ppcl_ds.probing.probe import check, merge_parts, probe

    teacher = check(loaded, part, merge)
    if merge:
        merge_parts(loaded, teacher)
        return
    launch.on_ranks(loaded.topology.world)
    with memory.told("probe", "lower probe.batch_size or probe.blocks_at_once, or set teacher.offload: cpu"):
        probe(loaded, teacher, part)


@app.command()
def plan(
    recipe: RecipeFile,
    from_run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Choose among the units that this run has trained, by what they cost."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what is wrong with the plan file, choose nothing.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the plan file's variants and draw error over size, choose nothing.")
    ] = False,
) -> None:
    """Choose the units of every variant and write plan.yaml.

    Each variant gives up the share of the teacher's blocks that the recipe asks for (plan.budget), at the least error
    that the probe expects. The file is meant to be read and edited.

    With --from-run, units that have been trained a little (ppcl distill --until) are plugged into the teacher alone and
    in sets, their velocity error on held-out data is measured, and every variant is chosen anew. RUN is this recipe's
    run folder, where units that no variant needs are dropped and ppcl distill goes on with the others; or that of
    another run of the same teacher, whose choice this recipe then trains from the start.

    With plan.width in the recipe, the library also holds width units, and every block may then stay, be narrowed, lose
    its text stream or feed-forward to linears, or go with a span, whatever does least harm for the budget.
    """
    loaded = load_recipe(recipe)
    if sum((from_run is not None, check, show)) > 1:
        raise UserError("--from-run, --check and --show: give one of them at a time")
    from ppcl_ds.planning import planner as run

    if from_run is not None:
        from ppcl_ds.planning.replan import Replan

        replan = Replan(loaded, from_run)
        if (swaps := replan.measured) is not None:
            replan.write(swaps)
            return
        launch.on_ranks(loaded.topology.world)
        with memory.told("plan", "lower evaluate.batch_size"):
            replan.measure()
    elif check:
        run.check(loaded)
    elif show:
        run.show(loaded)
    else:
        run.plan(loaded)


@app.command()
def estimate(
    recipe: RecipeFile,
    nodes: Annotated[int, typer.Option(help="Nodes of the cluster.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="Accelerators of a node.", show_default="topology.stages x topology.replicas")
    ] = None,
    accelerator: Annotated[str, typer.Option(help=f"One of {', '.join(ACCELERATORS)}.")] = "h100",
    utilisation: Annotated[float, typer.Option(help="Share of its bf16 peak that matrix products reach.")] = 0.4,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Of a sample: 1024, HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES.", show_default="the recipe's"
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Estimate fine-tuning this variant instead of distilling.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file, too.")] = None,
) -> None:
    """Say what training will need: memory by part, the smallest cluster, and a lower bound of a step's time.

    Needs no GPU, and of the teacher only its configurations. Without a plan.yaml, spans are assumed.
    A cluster of another size than the topology's keeps its stages and changes its replicas.
    Exit code 0: it fits. 1: it does not. 2: something is wrong with the question.
    """
    loaded = load_recipe(recipe)
    from ppcl_ds.estimate.estimate import estimate

    fits = estimate(
        loaded,
        nodes,
        gpus_per_node,
        accelerator=accelerator,
        utilisation=utilisation,
        pixels=size,
        variant=variant,
        json=json,
    )
    if not fits:
        raise typer.Exit(1)


@app.command()
def distill(
    recipe: RecipeFile,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, plan, topology and shards, print the estimate, stop there.")
    ] = False,
    until: Annotated[
        int | None, typer.Option(min=1, metavar="STEP", help="Stop after this step; the next start goes on.")
    ] = None,
) -> None:
    """Train all units of the plan at once against the frozen teacher.

    Starts `topology.stages x topology.replicas` processes on this machine (under torchrun it joins them instead),
    streams the shards, and goes on from the newest checkpoint if there is one. Watch it: tensorboard --logdir RUN.
    """
    loaded = load_recipe(recipe)
    from ppcl_ds.distill.distill import check, distill

    teacher, checked = check(loaded)
    if dry_run:
        from ppcl_ds.estimate.estimate import print_estimate

        print_estimate(loaded, teacher)
        return
    launch.on_ranks(loaded.topology.world)
    from ppcl_ds.estimate.card import warn_if_too_small

    with memory.told("distill", memory.training_lower("distill", loaded.distill, loaded.teacher)):
        distill(loaded, teacher, checked, until, partial(warn_if_too_small, loaded, teacher))


@app.command()
def finetune(
    recipe: RecipeFile,
    variant: Annotated[str, typer.Option(metavar="NAME", help="Variant of the plan to fine-tune.")],
    from_run: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Run whose trained units it starts with.", show_default="own run"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the estimate, stop there.")
    ] = False,
    until: Annotated[
        int | None, typer.Option(min=1, metavar="STEP", help="Stop after this step; the next start goes on.")
    ] = None,
) -> None:
    """Train one variant end to end, its blocks over the pipeline stages, against the teacher's velocity, data, or both.

    Starts processes, streams shards and goes on from its newest checkpoint as `ppcl distill` does, in
    finetune/VARIANT of the run folder. `ppcl consolidate` then also writes pruned/VARIANT-finetuned.
    """
    loaded = load_recipe(recipe)
    from ppcl_ds.finetune.finetune import check, finetune, newer_units

    checked = check(loaded, variant, from_run)
    if dry_run:
        from ppcl_ds.estimate.estimate import print_estimate

        print(newer_units(checked.folder), end="")
        print_estimate(loaded, checked.teacher, variant)
        return
    launch.on_ranks(loaded.topology.world)
    from ppcl_ds.estimate.card import warn_if_too_small

    with memory.told("finetune", memory.training_lower("finetune", loaded.tuning, loaded.teacher)):
        finetune(checked, until, partial(warn_if_too_small, loaded, checked.teacher, variant))


@app.command()
def evaluate(
    recipe: RecipeFile,
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
) -> None:
    """Teacher, variants and undistilled variants side by side, on the same noise.

    Writes samples.png, report.json and report.html into the run folder, and the figures into the models' cards.

    Prompt sets (evaluate.sets) are drawn first, by teacher and variants, on all GPUs of this machine or all processes
    that torchrun or Slurm have started, and laid out in evaluate/ as their benchmarks' scorers read them. Stopped, it
    goes on where it was.
    """
    loaded = load_recipe(recipe)
    from ppcl_ds.evaluate.evaluate import check, evaluate, take_scores

    if read_scores and speed:
        raise UserError("--read-scores and --speed: give one of them at a time")
    if read_scores:
        take_scores(loaded, read_scores)
        return
    checked = check(loaded)
    if speed:
        from ppcl_ds.evaluate.speed import measure_speed

        if launch.is_first_rank():
            with memory.told("evaluate", _EVALUATE_LESS):
                measure_speed(loaded, checked.teacher, checked.drawn)
        return
    if loaded.evaluate.sets and (gpus := launch.gpus()) > 1:
        launch.on_ranks(gpus)
    with memory.told("evaluate", _EVALUATE_LESS):
        evaluate(checked)


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
    """Draw images with the teacher or with a variant, one column a prompt.

    It is drawn with as diffusers does. A GPU is used if there is one.
    """
    from ppcl_ds.evaluate.sample import sample

    sample(model, prompt, out, seed=seed, steps=steps, guidance=guidance, size=size)


@app.command()
def demo(
    recipe: RecipeFile = DEMO_RECIPE,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of going on where the last demo stopped.")
    ] = False,
) -> None:
    """The whole road on real pictures, from data and a teacher to figures; what is done stays done.

    Handwritten digits, unless another recipe with a section 'demo' is given, such as recipes/emoji.yaml.
    """
    loaded = load_recipe(recipe)
    from ppcl_ds.demo.demo import demo

    demo(recipe, loaded, fresh)


def main() -> None:
    """Entry point of the `ppcl` command."""
    console.run(app)


if __name__ == "__main__":
    main()
