"""What a step asks of an accelerator, counted on a pretended one: waits, gathers, kernels.

    python -m benchmarks.pretend [--json FILE] [--quick]

Rank 0 of 4 stages x 2 replicas, micro-batch 2, at the published size; `--quick` takes two stages and six blocks of each
kind, as the rows of a teacher in CPU memory always do. Nothing is computed and no accelerator is needed, see
`tests/pretend/`. These are counts and not times: "other" is how much there is of what "ours" is a part of.
"""

from __future__ import annotations

import typer

from benchmarks.table import JsonFile, Quick, Row, row, show
from tests.pretend.cases import Case
from tests.pretend.observe import observe

NAMES = {"qwen": "Qwen-Image", "flux": "FLUX.1"}


def rows_of(case: Case) -> list[Row]:
    """What one rank's step showed."""
    [rank] = observe(case, (0,))
    step, name = rank.notes["step"], NAMES[case.family] + (", teacher in CPU memory" if case.teacher_offload else "")
    gathered, attention, waits = step["gathered"], step["attention"], rank.waits()
    teacher, kernels = (gathered.get("ahead", 0) + gathered.get("late", 0)) / 2**30, sum(step["kernels"].values())
    ahead, calls = gathered.get("ahead", 0) / 2**30, sum(attention.values())
    where = ", ".join(f"{count} in {place}" for place, count in waits.items())
    return [
        row(f"{name}: gathered ahead / all", ahead, teacher, "GiB", f"in {step['gathers']} gathers, the update's too"),
        row(f"{name}: attention without a mask / all", attention.get("flash", 0), calls, "calls", "no padding"),
        row(f"{name}: waits of the host / kernels", sum(waits.values()), kernels, "a step", where),
    ]


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Print the table."""
    blocks = 6 if quick else 0
    cases = [Case(family=family, blocks=blocks, stages=4, replicas=2, rounds=1) for family in ("qwen", "flux")]
    if quick:
        cases = [Case(family=case.family, blocks=blocks, rounds=1) for case in cases]
    cases.append(Case(blocks=6, rounds=1, teacher_offload=True))
    show("a step on a pretended accelerator", [each for case in cases for each in rows_of(case)], json)


if __name__ == "__main__":
    typer.run(main)
