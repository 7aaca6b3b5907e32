"""What of a variant is trained, what its blocks cost, and which of them must stay together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.files import Sources

Trainable = Literal["all", "neighbours", "units"]

REST = "rest"
"""What belongs to no block: embeddings, the head. Every stage has it."""

IDLE = "idle"
"""The one part of a stage that has nothing to train: a number that nobody uses."""


@dataclass(frozen=True)
class Part:
    """Parameters that are one flat vector to the optimizer and to checkpoints.

    Attributes:
        name: of the block, such as `transformer_blocks.3`, or `rest`; with `.kept` for what is left of a block that has
            width units.
        place: number of the block in the variant; None: of no block.
        parameters: their names in the state dict.
        kept: whether they were the teacher's; else they are a unit's.
    """

    name: str
    place: int | None
    parameters: tuple[str, ...]
    kept: bool


def parts_of(anatomy: Anatomy, model: nn.Module, tensors: Sources, trainable: Trainable) -> list[Part]:
    """What is trained, in the order of the blocks.

    Args:
        anatomy: the variant's.
        model: the variant, empty.
        tensors: its state dict; they know whose they were.
    """
    blocks = anatomy.blocks
    names = [name for name, _ in model.named_parameters()]
    places: list[tuple[str, int | None]] = [(block.key, block.index) for block in blocks]
    own = {key: [name for name in names if name.startswith(f"{key}.")] for key, _ in places}
    inside = {name for each in own.values() for name in each}
    own[REST] = [name for name in names if name not in inside]
    replaced = [any(tensors[name].unit for name in own[key]) for key, _ in places]
    near = {
        place for place in range(len(blocks)) if any(replaced[max(0, place - 1) : place + 2])
    }  # a unit's block, or one beside it
    parts = []
    for key, place in [*places, (REST, None)]:
        units = tuple(name for name in own[key] if tensors[name].unit)
        kept = tuple(name for name in own[key] if not tensors[name].unit)
        if units:
            parts.append(Part(key, place, units, kept=False))
        if kept and (trainable == "all" or (trainable == "neighbours" and place in near)):
            parts.append(Part(f"{key}.kept" if units else key, place, kept, kept=True))
    return parts


def joined(config: dict[str, Any], keys: Sequence[str]) -> list[bool]:
    """For each block of a variant, whether it has to stay with the one before: it reads a linear of that one's text.

    Args:
        config: the variant's.
        keys: its blocks, as in a state dict.
    """
    reads = set(config.get("linear_text") or ())
    return [key in reads for key in keys]


def block_costs(
    flops: Sequence[float], anatomy: Anatomy, variant: nn.Module, places: Sequence[tuple[int, object]]
) -> list[float]:
    """FLOPs of each block of a variant: the teacher block's, as far as its parameters are left.

    Args:
        flops: of the teacher's blocks.
        variant: empty.
        places: see `Plan.places`.
    """
    own = [block.parameters for block in Anatomy(variant, anatomy.flows).blocks]
    origins = [origin for origin, _ in places]
    return [flops[o] * min(1.0, own[n] / anatomy.blocks[o].parameters) for n, o in enumerate(origins)]
