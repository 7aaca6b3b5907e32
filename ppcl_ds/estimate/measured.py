"""Everything about a run that does not depend on the cluster, measured once on the meta device."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.estimate.activations import block_activations, unit_activations
from ppcl_ds.teacher.anatomy import Anatomy, block_shapes
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.flops import Work, work_of
from ppcl_ds.training.meta_forward import Rehearsal, rehearse
from ppcl_ds.units.kinds import batches_of, empty_unit, taps_of
from ppcl_ds.units.plan import Plan
from ppcl_ds.units.unit import Unit, UnitBatch


@dataclass(frozen=True)
class Measured:
    """A teacher, a plan and a micro-batch.

    Attributes:
        parameters: elements and bytes of an element, for each parameter of the teacher.
        used: the same, without the blocks that no unit needs.
        buffers: bytes of the teacher's buffers.
        largest_block: elements of its largest block that runs.
        largest_parameter: elements of the largest parameter of any unit.
        element: bytes of an element in the number format of the run.
        unit_parameters: unit -> its parameters.
        parcels: unit -> what it reads from one teacher forward, meta tensors.
        activations: unit -> most bytes that its training on one micro-batch takes.
        teacher_activations: most bytes that the forward of a teacher block takes on one micro-batch, outputs included.
        work: of one sample.
        micro_batch: samples in a micro-batch.
    """

    parameters: tuple[tuple[int, int], ...]
    used: tuple[tuple[int, int], ...]
    buffers: int
    largest_block: int
    largest_parameter: int
    element: int
    unit_parameters: dict[str, int]
    parcels: dict[str, UnitBatch]
    activations: dict[str, int]
    teacher_activations: int
    work: Work
    micro_batch: int

    def message(self, units: Iterable[str]) -> int:
        """Bytes that the exchange sends for these units from one micro-batch: each tensor once."""
        tensors = {id(tensor): tensor for tensor in self._tensors(units)}
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())

    def held(self, units: Iterable[str]) -> int:
        """Bytes of memory behind what these units read from one micro-batch: each storage once."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self._tensors(units)}
        return sum(storage.nbytes() for storage in storages.values())

    def _tensors(self, units: Iterable[str]) -> list[Tensor]:
        leaves = pytree.tree_leaves([vars(self.parcels[name]) for name in units])
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def measure(
    teacher: Teacher,
    plan: Plan,
    latents: tuple[int, int, int],
    text_tokens: int,
    *,
    micro_batch: int,
    dtype: torch.dtype,
    checkpointing: bool,
) -> Measured:
    """Rehearse the teacher on one micro-batch, and one unit of every kind.

    Args:
        latents: (C, H, W) of a sample.
        text_tokens: tokens of its prompt.
        micro_batch: samples in a micro-batch.
        dtype: number format of teacher and units while they run.
        checkpointing: whether units recompute their activations.

    Raises:
        UserError: the teacher cannot read samples of this shape.
    """
    wanted = taps_of(plan, teacher.anatomy)
    rehearsal = rehearse(teacher, latents, text_tokens, micro_batch, dtype, wanted.parts)
    last = wanted.last
    unused = tuple(f"{block.key}." for block in teacher.blocks[last + 1 :])
    named = {name: (p.numel(), p.itemsize) for name, p in rehearsal.model.named_parameters()}
    parcels = batches_of(rehearsal.capture, rehearsal.text_mask, plan, teacher.anatomy)
    units = {unit.name: empty_unit(unit, teacher, dtype) for unit in plan.units}
    sizes = {name: [parameter.numel() for parameter in unit.parameters()] for name, unit in units.items()}
    return Measured(
        parameters=tuple(named.values()),
        used=tuple(size for name, size in named.items() if not name.startswith(unused)),
        buffers=sum(buffer.numel() * buffer.itemsize for buffer in rehearsal.model.buffers()),
        largest_block=max(block.parameters for block in teacher.blocks[: last + 1]),
        largest_parameter=max(map(max, sizes.values())),
        element=dtype.itemsize,
        unit_parameters={name: sum(each) for name, each in sizes.items()},
        parcels=parcels,
        activations=_unit_activations(rehearsal, teacher.anatomy, plan, units, parcels, checkpointing),
        teacher_activations=_teacher_activations(rehearsal, teacher.anatomy, last),
        work=work_of(rehearsal, plan, micro_batch),
        micro_batch=micro_batch,
    )


def _kind(rehearsal: Rehearsal, anatomy: Anatomy, index: int) -> Hashable:
    """What tells apart blocks that need different memory; one of a kind is measured."""
    block = anatomy.blocks[index]
    shapes = block_shapes(anatomy.module(rehearsal.model, block))
    streams = {name: tensor.shape for name, tensor in rehearsal.capture.streams[block.entering].items()}
    return block.list_name, frozenset(shapes.items()), frozenset(streams.items())


def _unit_activations(
    rehearsal: Rehearsal,
    anatomy: Anatomy,
    plan: Plan,
    units: Mapping[str, Unit],
    parcels: Mapping[str, UnitBatch],
    checkpointing: bool,
) -> dict[str, int]:
    known: dict[Hashable, int] = {}
    found = {}
    for unit in plan.units:
        kind = (_kind(rehearsal, anatomy, unit.span[0]), unit.kind, unit.streams, unit.keep, len(unit.outputs))
        if kind not in known:
            known[kind] = unit_activations(units[unit.name], parcels[unit.name], checkpointing)
        found[unit.name] = known[kind]
    return found


def _teacher_activations(rehearsal: Rehearsal, anatomy: Anatomy, last: int) -> int:
    kinds = {_kind(rehearsal, anatomy, block.index): block for block in anatomy.blocks[: last + 1]}
    capture = rehearsal.capture
    return max(
        block_activations(
            block,
            anatomy.module(rehearsal.model, block),
            capture.streams[block.entering],
            capture.conditioning[block.index],
        )
        for block in kinds.values()
    )
