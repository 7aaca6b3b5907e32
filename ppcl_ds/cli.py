"""The `ppcl` command: one function a subcommand; the work is done in the folders.

Each step is imported when it is called, after the check of the recipe: help and a wrong key answer at once.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ppcl_ds import console, early, launch, memory
from ppcl_ds.cluster.cli import app as cluster_app
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.accelerators import ACCELERATORS, accelerator_called
from ppcl_ds.evaluate.cli import app as evaluate_app
from ppcl_ds.export.cli import app as export_app
from ppcl_ds.options import Changes, RecipePath, program
from ppcl_ds.recipe import load_recipe
from ppcl_ds.recipe_file import typed
from ppcl_ds.report.cli import app as report_app
from ppcl_ds.report.renew import renew
from ppcl_ds.shipped import shipped
from ppcl_ds.start.cli import app as start_app
from ppcl_ds.teacher.cli import app as teacher_app


def _renew(done: object, **_: object) -> None:
    """Have the run's page show what a command has done."""
    if isinstance(done, early.Done):
        renew(done.recipe, done.command, done.shown)


app = program(
    "Shrink a diffusion transformer into a family of smaller ones. The road: [bold]ppcl-data shard[/] and "
    "[bold]encode[/], then [bold]ppcl probe[/], [bold]plan[/], [bold]distill[/], [bold]finetune[/], "
    "[bold]consolidate[/] and [bold]evaluate[/]. Every step reads the same recipe and writes into its run folder. "
    "[bold]ppcl demo[/] walks it all on real handwritten digits in ten to fifteen minutes.",
    rich_markup_mode="rich",
    result_callback=_renew,
)

app.add_typer(start_app)
app.add_typer(export_app)
app.add_typer(evaluate_app)
app.add_typer(cluster_app)
app.add_typer(teacher_app)
app.add_typer(report_app)

DEMO_RECIPE = shipped("recipes/digits.yaml")


@app.command()
def probe(
    recipe: RecipePath,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Read only the I-th of N parts of the samples, and keep its sums.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add up the sums of all parts and report.")] = False,
    changes: Changes = None,
) -> early.Done | None:
    """Find what the teacher could do without.

    Fits a linear probe to every block, measures how far chains of them stray (CKA and error), and writes
    probe/report.json and plots into the run folder, whose page it renews. Needs encoded shards and the teacher.
    An array of jobs shares the work: each runs one --part, in any order and again if need be; then --merge.
    """
    loaded = load_recipe(recipe, changes or ())
    if part and merge:
        raise UserError("--part and --merge: give one of them; parts are merged when all of them are there")
    _ = loaded.teacher.folder  # refused if it is not there, or fetched from the hub
    if not merge:
        launch.on_ranks(loaded.topology.world)
    early.begin(loaded, "merge" if merge else "probe", "checks recipe, shards and teacher")
    from ppcl_ds.probing.probe import check, merge_parts, probe

    teacher = check(loaded, part, merge)
    if merge:
        merge_parts(loaded, teacher)
        return early.Done(loaded, "probe --merge")
    with memory.told("probe", "lower probe.batch_size or probe.blocks_at_once, or set teacher.offload: cpu"):
        probe(loaded, teacher, part)
    return early.Done(loaded, f"probe --part {part}" if part else "probe", part is None)


@app.command()
def plan(
    recipe: RecipePath,
    from_run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Choose among the units that this run has trained, by what they cost."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what is wrong with the plan file, choose nothing.")
    ] = False,
    show: Annotated[
        bool,
        typer.Option(
            "--show", help="Print the plan file's variants, have the page show error over size, choose nothing."
        ),
    ] = False,
    changes: Changes = None,
) -> early.Done | None:
    """Choose the units of every variant and write plan.yaml.

    Each variant gives up the share of the teacher's blocks that the recipe asks for (plan.budget), at the least error
    that the probe expects. The file is meant to be read and edited.

    With --from-run, units that have been trained a little (ppcl distill --until) are plugged into the teacher alone and
    in sets, their errors on held-out data are measured (plan.objective), and every variant is chosen anew. RUN is this
    recipe's run folder, where units that no variant needs are dropped and ppcl distill goes on with the others; or that
    of another run of the same teacher, whose choice this recipe then trains from the start.

    With plan.width in the recipe, the library also holds width units, and every block may then stay, be narrowed, lose
    its text stream or feed-forward to linears, or go with a span, whatever does least harm for the budget.
    """
    loaded = load_recipe(recipe, changes or ())
    if sum((from_run is not None, check, show)) > 1:
        raise UserError("--from-run, --check and --show: give one of them at a time")
    _ = loaded.teacher.folder  # refused if it is not there, or fetched from the hub
    if check and early.PlanMemory(loaded).known:
        print(f"{loaded.plan_file} is in order, as when it was last written or checked")
        return None
    if check or show:
        early.say("plan: opens the teacher")
    else:
        early.begin(loaded, "plan", "opens the teacher")
    from ppcl_ds.planning import planner as run

    if from_run is not None:
        from ppcl_ds.planning.replan import Replan

        replan = Replan(loaded, from_run)
        if (swaps := replan.measured) is not None:
            replan.write(swaps)
            return early.Done(loaded, "plan")
        launch.on_ranks(loaded.topology.world)
        with memory.told("plan", "lower evaluate.batch_size"):
            replan.measure()
    elif check:
        run.check(loaded)
        return None
    elif show:
        run.show(loaded)
    else:
        run.plan(loaded)
    return early.Done(loaded, "plan")


@app.command()
def estimate(
    recipe: RecipePath,
    nodes: Annotated[int, typer.Option(help="Nodes of the cluster.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="Accelerators of a node.", show_default="topology.stages x topology.replicas")
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(ACCELERATORS)}.",
            show_default="cluster.accelerator, else this machine's GPU; in bf16 h100, in fp32 this CPU",
        ),
    ] = None,
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
    price: Annotated[
        float | None, typer.Option(min=0.0, metavar="NUMBER", help="Of an accelerator hour, in any currency.")
    ] = None,
    details: Annotated[bool, typer.Option("--details", help="Where memory and time go, too.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file, too.")] = None,
    changes: Changes = None,
) -> None:
    """Say what the run will need: whether it fits, the smallest cluster, hours and cost of every step, disk.

    Needs no GPU, and of the teacher only its configurations. Without a plan.yaml, spans are assumed; times are lower
    bounds. A cluster of another size than the topology's keeps its stages and changes its replicas.
    Exit code 0: it fits. 1: it does not. 2: something is wrong with the question.
    """
    loaded = load_recipe(recipe, changes or ())
    if accelerator is not None:
        accelerator_called(accelerator)
    _ = loaded.teacher.folder  # refused if it is not there, or fetched from the hub
    if variant and loaded.plan_file.exists():
        early.check_variants(loaded.plan_file, [variant])
    early.say("estimate: reads the teacher's configuration")
    from ppcl_ds.estimate.estimate import estimate

    fits = estimate(
        loaded,
        nodes,
        gpus_per_node,
        accelerator=accelerator,
        utilisation=utilisation,
        pixels=size,
        variant=variant,
        price=price,
        details=details,
        json=json,
    )
    if not fits:
        raise typer.Exit(1)


@app.command()
def distill(
    recipe: RecipePath,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, plan, topology and shards, print the estimate, stop there.")
    ] = False,
    until: Annotated[
        int | None, typer.Option(min=1, metavar="STEP", help="Stop after this step; the next start goes on.")
    ] = None,
    changes: Changes = None,
) -> early.Done | None:
    """Train all units of the plan at once against the frozen teacher.

    Starts `topology.stages x topology.replicas` processes on this machine (under torchrun it joins them instead),
    streams the shards, and goes on from the newest checkpoint if there is one. Watch it: tensorboard --logdir RUN.
    """
    loaded = load_recipe(recipe, changes or ())
    early.check_training(loaded, ())
    if not dry_run:
        named = typed(recipe, changes or ())
        if early.is_finished(loaded, loaded.distillation, loaded.distill.steps, named):
            return None
        launch.on_ranks(loaded.topology.world)
    early.say("distill: checks recipe, plan, shards and teacher")
    from ppcl_ds.distill.distill import check, distill

    teacher, checked = check(loaded)
    if dry_run:
        from ppcl_ds.estimate.estimate import print_estimate

        print_estimate(loaded, teacher)
        return None
    from ppcl_ds.estimate.card import warn_if_too_small

    with memory.told("distill", memory.training_lower("distill", loaded.distill, loaded.teacher)):
        distill(loaded, teacher, checked, until, partial(warn_if_too_small, loaded, teacher))
    return early.Done(loaded, "distill")


@app.command()
def finetune(
    recipe: RecipePath,
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
    changes: Changes = None,
) -> early.Done | None:
    """Train one variant end to end, its blocks over the pipeline stages, against the teacher's velocity, data, or both.

    Starts processes, streams shards and goes on from its newest checkpoint as `ppcl distill` does, in
    finetune/VARIANT of the run folder. `ppcl consolidate` then also writes pruned/VARIANT-finetuned.
    """
    loaded = load_recipe(recipe, changes or ())
    early.check_training(loaded, [variant])
    if not dry_run:
        named = typed(recipe, changes or ())
        if early.is_finished(loaded, loaded.finetuning(variant), loaded.tuning.steps, named):
            return None
        launch.on_ranks(loaded.topology.world)
    early.say("finetune: checks recipe, plan, shards, units and teacher")
    from ppcl_ds.finetune.finetune import check, finetune, newer_units

    checked = check(loaded, variant, from_run)
    if dry_run:
        from ppcl_ds.estimate.estimate import print_estimate

        print(newer_units(checked.folder), end="")
        print_estimate(loaded, checked.teacher, variant)
        return None
    from ppcl_ds.estimate.card import warn_if_too_small

    with memory.told("finetune", memory.training_lower("finetune", loaded.tuning, loaded.teacher)):
        finetune(checked, until, partial(warn_if_too_small, loaded, checked.teacher, variant))
    return early.Done(loaded, f"finetune {variant}")


@app.command()
def demo(
    recipe: RecipePath = DEMO_RECIPE,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of going on where the last demo stopped.")
    ] = False,
    changes: Changes = None,
) -> None:
    """The whole road on real pictures, from data and a teacher to figures; what is done stays done.

    Handwritten digits, unless another recipe with a section 'demo' is given, such as recipes/emoji.yaml.
    """
    loaded = load_recipe(recipe, changes or ())
    early.say("demo: looks at what is done")
    from ppcl_ds.demo.demo import demo

    demo(recipe, loaded, fresh, changes or ())


def main() -> None:
    """Entry point of the `ppcl` command."""
    console.run(app)


if __name__ == "__main__":
    main()
