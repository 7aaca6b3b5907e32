"""What a step asks of an accelerator, counted on a pretended one: waits, gathers, kernels; and what a look asks.

    python -m benchmarks.pretend [--json FILE] [--quick]

Rank 0 of 4 stages x 2 replicas, micro-batch 2, at the published size; `--quick` takes two stages and six blocks of each
kind, as the rows of a teacher in CPU memory always do. Looks and exchanges are of few narrow blocks, as their counts do
not depend on that. Nothing is computed and no accelerator is needed, see `tests/pretend/`. These are counts and not
times: "other" is how much there is of what "ours" is a part of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import typer
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.table import JsonFile, Quick, Row, row, show
from tests.pretend.cases import Case
from tests.pretend.observe import observe
from tests.pretend.replay import Group, make_groups

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


def held_whole(case: Case) -> list[Row]:
    """What a teacher that every rank has whole saves, and what it takes."""
    [whole], [divided] = (observe(each, (0,)) for each in (replace(case, whole=True), case))
    name = NAMES[case.family]
    gathered, peaks = (
        [sum(seen.notes["step"]["gathered"].get(when, 0) for when in ("ahead", "late")) for seen in (whole, divided)],
        [seen.notes["step"]["peak"] / 2**30 for seen in (whole, divided)],
    )
    gathers = " and ".join(str(seen.notes["step"]["gathers"]) for seen in (whole, divided))
    kernels = " and ".join(f"{sum(seen.notes['step']['kernels'].values()):,}" for seen in (whole, divided))
    return [
        row(
            f"{name}: teacher gathered, whole / divided",
            gathered[0] / 2**30,
            gathered[1] / 2**30,
            "GiB",
            f"in {gathers} gathers, the update's too; {kernels} kernels",
        ),
        row(f"{name}: peak memory, teacher whole / divided", peaks[0], peaks[1], "GiB", "of a step"),
    ]


def looks_and_exchanges() -> list[Row]:
    """Rank 0's share of a look at held-out data, and the collectives of an exchange."""
    case = Case(heads=2, blocks=8, size=16, tokens=(12,), stages=4, replicas=2, rounds=1, drawing_steps=30)
    [seen] = observe(replace(case, then=("look",)), (0,))
    figures, images = (seen.notes[during]["samples"] for during in ("figures", "look"))
    found = [row("samples of a look: figures / with images", figures, images, "samples", "2 models; 8 ranks share 8")]
    [distill], [finetune] = (observe(each, (0,)) for each in (case, replace(case, what="finetune")))
    flights = [seen.notes["exchange"]["flights"] for seen in (finetune, distill)]
    found.append(row("flights of a round: finetune / distill", flights[0], flights[1], "a round", "4 stages"))
    return found


def as_it_was() -> list[Row]:
    """What the usual way, put in on purpose, costs of a few narrow blocks."""
    narrow = Case(heads=2, blocks=8, size=16, tokens=(12,), rounds=1)
    place = "training/delivery.py:sent"
    waits = [observe(replace(narrow, mistake=how), (0,))[0].waits().get(place, 0) for how in ("", "pageable")]
    measuring = replace(narrow, what="swaps", blocks=4, plan="width", stages=1, replicas=2)
    late = [1 - observe(replace(measuring, mistake=how), (0,))[0].ahead("errors") for how in ("", "forgetful")]
    made = [rank.groups for rank in observe(replace(narrow, blocks=4, replicas=2))]
    moved = [moved_bytes(how) / 2**20 for how in (_summed_at_once, _summed_by_a_copy)]
    return [
        row("waits for copies of a micro-batch: pinned / pageable", waits[0], waits[1], "a step", "sent ahead"),
        row(
            "gathered late in `plan --from-run`: / order forgotten",
            late[0],
            late[1],
            "share",
            "from the second forward",
        ),
        row("a gradient into its float32 sum / by a copy", moved[0], moved[1], "bytes", "a parameter, both ways"),
        row(
            "splits of NCCL's group for nothing: / gloo groups made by all",
            make_groups(made, barrier=False),
            make_groups(_made_by_all(made), barrier=False),
            "splits",
            "2 stages x 2 replicas; each waits for all ranks",
        ),
    ]


def _made_by_all(made: Sequence[Sequence[Group]]) -> list[list[Group]]:
    """The groups that members make alone, made by every rank, in the place of the first one of them."""
    alone = sorted({ranks for groups in made for _, ranks, local in groups if local})
    return [
        [
            each
            for backend, ranks, local in groups
            for each in ([("gloo", members, False) for members in alone] if local else [(backend, ranks, local)])
        ]
        for groups in made
    ]


class _Moved(TorchDispatchMode):
    """Counts bytes that operations read and write."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
        self.bytes += sum(tensor.nbytes for tensor in tensors)
        return output


def moved_bytes(add: Any) -> int:
    """Bytes that a way to sum 2**20 gradients moves."""
    total, gradient = (torch.zeros(2**20, dtype=dtype, device="meta") for dtype in (torch.float32, torch.bfloat16))
    with _Moved() as moved:
        add(total, gradient)
    return moved.bytes


def _summed_at_once(total: Tensor, gradient: Tensor) -> None:
    total.add_(gradient)


def _summed_by_a_copy(total: Tensor, gradient: Tensor) -> None:
    total.add_(gradient.to(torch.float32))


def main(json: JsonFile = None, quick: Quick = False) -> None:
    """Print the table."""
    blocks = 6 if quick else 0
    cases = [Case(family=family, blocks=blocks, stages=4, replicas=2, rounds=1) for family in ("qwen", "flux")]
    if quick:
        cases = [Case(family=case.family, blocks=blocks, rounds=1) for case in cases]
    rows = [each for case in cases for each in (*rows_of(case), *held_whole(case))]
    rows += rows_of(Case(blocks=6, rounds=1, teacher_offload=True))
    show("a step on a pretended accelerator", rows + looks_and_exchanges() + as_it_was(), json)


if __name__ == "__main__":
    typer.run(main)
