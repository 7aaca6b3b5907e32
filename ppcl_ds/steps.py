"""The chain as a table: every step's script, what it waits for, how large it is, and whether it has been done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.units.plan import finetuned

STEPS = ("encode", "probe", "merge", "plan", "distill", "finetune", "consolidate", "evaluate")


@dataclass(frozen=True)
class Step:
    """One job, or one array of jobs.

    Attributes:
        name: its script is `NAME.sbatch`.
        done: whether what it makes is there.
        after: steps that must have ended well.
        follows: whether it is done again when one of those is.
        ranks: whether it runs on all processes of the topology; else it is one process.
        array: the numbers of its tasks, as sbatch reads them; empty: it is a single job.
        arguments: of its script, behind the recipe.
    """

    name: str
    done: bool
    after: tuple[str, ...] = ()
    follows: bool = False
    ranks: bool = False
    array: str = ""
    arguments: tuple[str, ...] = ()


def steps(recipe: Recipe, variants: Sequence[str]) -> list[Step]:
    """Every step of a run, in order.

    Args:
        variants: their names, as far as they are known.
    """
    encoded = (recipe.data.shards / "encoded" / "index.json").exists()
    planned = recipe.plan_file.exists()
    reported = planned or (recipe.probe_folder / "report.json").exists()
    parts = recipe.cluster.probe_parts
    probed = reported or len(list((recipe.probe_folder / "parts").glob(f"part-*-of-{parts:03d}.safetensors"))) == parts
    tuning = recipe.finetune
    tuned = tuning.variants if tuning else ()
    written = [*variants, *map(finetuned, tuned)]
    evaluated = (recipe.run / "report.json").exists()
    return [
        Step("encode", encoded, array=f"1-{recipe.cluster.encode_tasks}"),
        Step("probe", probed, ("encode",), ranks=True, array=f"1-{parts}"),
        Step("merge", reported, ("probe",)),
        Step("plan", planned, ("merge",)),
        Step("distill", recipe.distilled, ("encode", "plan"), ranks=True),
        *(
            [
                Step(
                    "finetune",
                    all(recipe.finetuning(name).finished(tuning.steps) for name in tuned),
                    ("distill",),
                    follows=True,
                    ranks=True,
                    array=f"0-{len(tuned) - 1}",
                    arguments=tuned,
                )
            ]
            if tuning and tuned
            else []
        ),
        Step(
            "consolidate",
            all((recipe.pruned(name) / "config.json").exists() for name in written),
            ("distill", "finetune"),
            follows=True,
            array=f"0-{len(written) - 1}",
            arguments=tuple(written),
        ),
        Step("evaluate", evaluated, ("encode", "consolidate"), follows=True),
    ]


def due(table: Sequence[Step], start: str | None) -> list[Step]:
    """The steps to run: those that are not done, or from one on, whatever is done.

    Raises:
        UserError: there is no such step, or one that it needs has not been done.
    """
    if start is None:
        names: set[str] = set()
        for step in table:
            if not step.done or (step.follows and names.intersection(step.after)):
                names.add(step.name)
        return [step for step in table if step.name in names]
    known = [step.name for step in table]
    if start not in known:
        raise UserError(f"--from {start}: there is no such step; the steps are {', '.join(known)}")
    chosen = list(table[known.index(start) :])
    for step in table[: known.index(start)]:
        if not step.done and any(step.name in later.after for later in chosen):
            raise UserError(f"--from {start}: {step.name} has not been done; use --from {step.name}, or leave it out")
    return chosen
