"""The road as one table: what each step makes and needs, and whether it has been done.

`ppcl demo` walks it on this machine; `ppcl submit` queues it as Slurm jobs, a script each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ppcl_ds.early import finetuned
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe

STEPS = ("encode", "probe", "merge", "plan", "distill", "finetune", "consolidate", "evaluate")
"""Those that a cluster does: packing images into shards needs none."""


@dataclass(frozen=True)
class Step:
    """One step: a command, and on a cluster one job or one array of jobs.

    Attributes:
        name: of its command; its script is `NAME.sbatch`.
        makes: what it leaves in the run folder.
        done: whether that is there; looks each time.
        needs: steps that must have ended well.
        follows: whether it is done again when one of those is.
        ranks: whether it runs on all processes of the topology; else it is one process.
        array: the numbers of its tasks, as sbatch reads them; empty: it is a single job.
        variants: that it works on, each by a task of its own.
    """

    name: str
    makes: tuple[Path, ...]
    done: Callable[[], bool]
    needs: tuple[str, ...] = ()
    follows: bool = False
    ranks: bool = False
    array: str = ""
    variants: tuple[str, ...] = ()


def steps(recipe: Recipe, variants: Sequence[str], parts: int = 0) -> list[Step]:
    """Every step of a run, in order.

    Args:
        variants: their names, as far as they are known.
        parts: of the probe, each a task of its own; of several, another step merges the sums; 0: it is no array.
    """
    shards, probe, run = recipe.data.shards, recipe.probe_folder, recipe.run
    tuned = recipe.finetune.variants if recipe.finetune else ()
    written = (*variants, *map(finetuned, tuned))
    figures = (run / "samples.png", run / "report.json", run / "report.html")

    def reported() -> bool:
        return recipe.plan_file.exists() or (probe / "report.json").exists()

    def summed() -> bool:
        return reported() or len(list((probe / "parts").glob(f"part-*-of-{parts:03d}.safetensors"))) == parts

    found = [Step("probe", (probe,), reported, ("encode",), ranks=True)]
    if parts == 1:
        found = [replace(found[0], array="1-1")]
    elif parts:
        found = [
            Step("probe", (probe / "parts",), summed, ("encode",), ranks=True, array=f"1-{parts}"),
            Step("merge", (probe,), reported, ("probe",)),
        ]
    if tuned:
        folders = tuple(recipe.finetuning(name).path for name in tuned)
        tune = Step(
            "finetune",
            folders,
            lambda: all(recipe.finetuning(name).finished(recipe.tuning.steps) for name in tuned),
            ("distill",),
            follows=True,
            ranks=True,
            array=f"0-{len(tuned) - 1}",
            variants=tuned,
        )
    return [
        Step("shard", (shards / "raw",), (shards / "raw" / "index.json").exists),
        Step(
            "encode",
            (shards / "encoded",),
            (shards / "encoded" / "index.json").exists,
            ("shard",),
            array=f"1-{recipe.cluster.encode_tasks}",
        ),
        *found,
        Step("plan", (recipe.plan_file,), recipe.plan_file.exists, (found[-1].name,)),
        Step("distill", (recipe.distillation.path,), lambda: recipe.distilled, ("encode", "plan"), ranks=True),
        *([tune] if tuned else []),
        Step(
            "consolidate",
            (run / "pruned",),
            lambda: all((recipe.pruned(name) / "config.json").exists() for name in written),
            ("distill", "finetune"),
            follows=True,
            array=f"0-{len(written) - 1}",
            variants=written,
        ),
        Step(
            "evaluate",
            figures,
            lambda: all(map(Path.exists, figures)),
            ("encode", "consolidate"),
            follows=True,
            ranks=bool(recipe.evaluate.sets),
        ),
    ]


def due(table: Sequence[Step], start: str | None) -> list[Step]:
    """The steps to run: those that are not done, or from one on, whatever is done.

    Raises:
        UserError: there is no such step, or one that it needs has not been done.
    """
    if start is None:
        names: set[str] = set()
        for step in table:
            if not step.done() or (step.follows and names.intersection(step.needs)):
                names.add(step.name)
        return [step for step in table if step.name in names]
    known = [step.name for step in table]
    if start not in known:
        raise UserError(f"--from {start}: there is no such step; the steps are {', '.join(known)}")
    chosen = list(table[known.index(start) :])
    for step in table[: known.index(start)]:
        if not step.done() and any(step.name in later.needs for later in chosen):
            raise UserError(f"--from {start}: {step.name} has not been done; use --from {step.name}, or leave it out")
    return chosen
