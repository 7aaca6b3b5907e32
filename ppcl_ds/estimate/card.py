"""The estimate's peak held against the accelerators that a training finds itself on."""

from __future__ import annotations

import os

import torch.distributed as dist

from ppcl_ds import launch, memory
from ppcl_ds.errors import brief
from ppcl_ds.estimate.accelerators import RESERVED
from ppcl_ds.estimate.inputs import Inputs, read_inputs
from ppcl_ds.estimate.measured import account_of, run_once
from ppcl_ds.estimate.numbers import Memory, add_up
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.teacher import Teacher

_GIB = 2**30


def warn_if_too_small(recipe: Recipe, teacher: Teacher, variant: str | None = None) -> None:
    """Say in one line that memory may run out, before anything is loaded; every rank of a training must call this.

    Rank 0 takes the estimate, in seconds and without the accelerator. Where there is none, nothing is said.

    Args:
        variant: that is fine-tuned; None: the library is distilled.
    """
    free = launch.all_gather(memory.free_bytes())
    if dist.get_rank() or None in free:
        return
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    section, settings = ("finetune", recipe.tuning) if variant else ("distill", recipe.distill)
    try:
        nodes = dist.get_world_size() // per_node
        stages = stage_memories(read_inputs(recipe, nodes, per_node, variant, teacher=teacher))
    except Exception as fault:  # whatever a block says to the meta device; the training does without
        print(f"note: what it needs of the accelerator could not be estimated ({brief(fault)})", flush=True)
        return
    if line := too_small(stages, min(size for size in free if size is not None)):
        print(f"warning: {line}; {memory.training_lower(section, settings, recipe.teacher)}", flush=True)


def too_small(stages: list[Memory], free: int) -> str:
    """Why so many free bytes may not be enough for the fullest stage; empty: they are."""
    stage = max(range(len(stages)), key=lambda number: stages[number].peak)
    peak = stages[stage].peak
    if peak <= (1 - RESERVED) * free:
        return ""
    return (
        f"{peak / _GIB:.1f} GiB are expected at the peak ({stages[stage].worst}, stage {stage}), and "
        f"{free / _GIB:.1f} GiB are free on the accelerator, {RESERVED:.0%} of which should stay so"
    )


def stage_memories(inputs: Inputs) -> list[Memory]:
    """The memory of a process of each stage."""
    return [add_up(stage) for stage in account_of(inputs, run_once(inputs)).phases(inputs.cluster)]
