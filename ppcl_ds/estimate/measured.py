"""The accounts of both trainings, filled in with what one micro-batch shows on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch

from ppcl_ds.data.batch import Size
from ppcl_ds.distill.phases import Distilling
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.activations import LiveBytes, block_activations, unit_activations
from ppcl_ds.estimate.inputs import Inputs
from ppcl_ds.estimate.units import sized
from ppcl_ds.finetune.phases import FineTuning
from ppcl_ds.finetune.trainable import block_costs, joined, parts_of
from ppcl_ds.teacher.anatomy import Anatomy, Streams, block_shapes
from ppcl_ds.teacher.batch_call import BatchCall
from ppcl_ds.teacher.files import empty_model
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.flops import work_of
from ppcl_ds.training.meta_forward import MetaForward, meta_forward
from ppcl_ds.training.phases import LayerCosts, TeacherCosts
from ppcl_ds.units.depth import DepthUnit
from ppcl_ds.units.kinds import batches_of, blank_unit, boundaries_of, empty_unit, taps_of
from ppcl_ds.units.unit import Unit, UnitBatch
from ppcl_ds.units.variant import layout


def run_once(inputs: Inputs) -> MetaForward:
    """The teacher on one micro-batch of the training that is asked about.

    Raises:
        UserError: the plan has no units, or the teacher cannot read samples of this shape.
    """
    if not inputs.plan.units:
        raise UserError(f"plan {inputs.recipe.plan_file}: it has no units, so there is nothing to train")
    taps = () if inputs.variant else taps_of(inputs.plan, inputs.teacher.anatomy).parts
    _prepare(inputs)
    return meta_forward(inputs.teacher, inputs.size, inputs.training.micro_batch, taps)


_MOST_SAMPLES, _MOST_BYTES = 4096, 2 * 2**30
"""Of a micro-batch that is measured, and of its latents and captions, which are real while it is."""


def _prepare(inputs: Inputs) -> None:
    """Have an encoded caption stand for all, if there is one, and refuse what would take minutes to be measured."""
    call, size, batch = inputs.teacher.call, inputs.size, inputs.training.micro_batch
    seen = inputs.seen
    if seen and seen.prompt.source == size.source:
        call.take_example(size, seen.prompt)
    one = sum(tensor.nbytes for tensor in call.example(size).tensors()) + 4 * call.latents_shape(size).numel()
    most = max(1, min(_MOST_SAMPLES, _MOST_BYTES // one))
    if batch > most:
        section = "finetune" if inputs.variant else "distill"
        raise UserError(
            f"{section}.micro_batch is {batch}: latents and captions alone would take {sized(batch * one)}; an "
            f"estimate is taken of at most {most} samples of this size, and gradients of more are added up by "
            f"{section}.micro_batches_per_step"
        )
    if seen and seen.prompt.source == size.source and batch > 1 and not size.source:
        call.take_example(size, BatchCall(call, seen.joining).joined([seen.prompt] * batch), batch)


def account_of(inputs: Inputs, forward: MetaForward) -> Distilling | FineTuning:
    """The account of the training that is asked about.

    Raises:
        UserError: as `fine_tuning`.
    """
    return fine_tuning(inputs, forward) if inputs.variant else distilling(inputs, forward)


def distilling(inputs: Inputs, forward: MetaForward) -> Distilling:
    """The account of `ppcl distill`."""
    settings, plan, anatomy = inputs.recipe.distill, inputs.plan, inputs.teacher.anatomy
    work = work_of(forward, plan, settings.micro_batch)
    batches = batches_of(forward.capture, forward.text_mask, plan, anatomy)
    meter = Meter(settings.activation_checkpointing)
    layers = []
    for unit in plan.units:
        module, batch = empty_unit(unit, inputs.teacher, inputs.dtype), batches[unit.name]
        sizes = [parameter.numel() for parameter in module.parameters()]
        layers.append(
            LayerCosts(
                name=unit.name,
                parameters=sum(sizes),
                trained=sum(sizes),
                flops=work.units[unit.name],
                activations=meter(module, batch),
                batch=batch,
            )
        )
    if settings.trajectories:  # to the end, for what it says
        teacher = teacher_costs(inputs, forward, len(anatomy.blocks) - 1)
        teacher = replace(teacher, forwards=settings.trajectories.forwards)
    else:
        teacher = teacher_costs(inputs, forward, taps_of(plan, anatomy).last)
    return Distilling(teacher, tuple(layers), settings, tuple(plan.variants.values()))


def fine_tuning(inputs: Inputs, forward: MetaForward) -> FineTuning:
    """The account of `ppcl finetune`.

    What width units take away of a block is taken off its parameters and, in proportion, its FLOPs, and not off its
    activations.

    Raises:
        UserError: the plan has no such variant, or the teacher's class has no such model.
    """
    assert inputs.variant is not None
    settings, teacher, plan, variant = inputs.recipe.tuning, inputs.teacher, inputs.plan, inputs.variant
    places = plan.places(variant)
    whole = layout(teacher, plan, variant, partial(blank_unit, teacher=teacher))
    model = empty_model(whole.config)
    own = Anatomy(model, teacher.flows)
    blocks = own.blocks
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained: dict[int | None, int] = dict.fromkeys([None, *range(len(blocks))], 0)
    for part in parts_of(own, model, whole.tensors, settings.trainable):
        trained[part.place] += sum(shapes[name] for name in part.parameters)
    costs = block_costs(forward.block_flops, teacher.anatomy, model, places)
    stays = joined(whole.config, [block.key for block in blocks])
    boundaries = boundaries_of(plan, variant) if settings.boundary_weight else {}
    streams, meter = forward.capture.streams, Meter(checkpointing=False)
    layers = []
    for block, (origin, _) in zip(blocks, places, strict=True):
        old = teacher.blocks[origin]
        module, entering = teacher.anatomy.module(forward.model, old), streams[old.entering]
        unit = DepthUnit(old, copy.deepcopy(module))
        image: Streams = {"image": streams[old.leaving]["image"]}
        last, judged = boundaries.get(block.index, (origin, ()))
        targets: Streams = {stream: streams[teacher.blocks[last].leaving][stream] for stream in judged}
        layers.append(
            LayerCosts(
                name=block.key,
                parameters=block.parameters,
                trained=trained[block.index],
                flops=costs[block.index] / settings.micro_batch,
                activations=meter(unit, UnitBatch(entering, forward.capture.conditioning[origin], image, None)),
                batch=UnitBatch(entering, {}, targets, None),
                joined=stays[block.index],
            )
        )
    costs_of_teacher = teacher_costs(inputs, forward, len(teacher.blocks) - 1)
    if settings.trajectories:
        costs_of_teacher = replace(costs_of_teacher, forwards=settings.trajectories.forwards)
    return FineTuning(
        costs_of_teacher,
        tuple(layers),
        settings,
        rest=whole.parameters - sum(block.parameters for block in blocks),
        trained_rest=trained[None],
        inputs=sum(tensor.nbytes for tensor in forward.read),
        velocities=forward.output.nbytes + forward.output.numel() * 4,  # the teacher's, and the data's in float32
    )


def teacher_costs(inputs: Inputs, forward: MetaForward, last: int) -> TeacherCosts:
    """What the teacher holds, and what its forward up to block `last` takes."""
    teacher, capture = forward.teacher, forward.capture
    named = {name: (p.numel(), p.itemsize) for name, p in forward.model.named_parameters()}
    unused = tuple(f"{block.key}." for block in teacher.blocks[last + 1 :])
    activations: dict[Hashable, int] = {}
    for block in teacher.blocks[: last + 1]:
        module, streams = teacher.anatomy.module(forward.model, block), capture.streams[block.entering]
        alike = (block.list_name, *block_shapes(module).items(), *((name, s.shape) for name, s in streams.items()))
        if alike not in activations:
            activations[alike] = block_activations(block, module, streams, capture.conditioning[block.index])
    return TeacherCosts(
        parameters=tuple(named.values()),
        used=tuple(size for name, size in named.items() if not name.startswith(unused)),
        buffers=sum(buffer.nbytes for buffer in forward.model.buffers()),
        largest_block=max(block.parameters for block in teacher.blocks[: last + 1]),
        element=inputs.dtype.itemsize,
        flops=forward.flops_until[last] / inputs.training.micro_batch,
        activations=max(activations.values()),
        sharding=inputs.sharding,
        decoder=decoder_bytes(teacher, inputs.size) if inputs.training.sample_every else 0,
    )


def decoder_bytes(teacher: Teacher, size: Size) -> int:
    """Bytes of the VAE in bfloat16, and the most that it takes beside that to decode one image.

    Of a VAE that cannot be run on the meta device, those of its weights alone.
    """
    vae = copy.deepcopy(teacher.call.pipe.vae).to(device="meta", dtype=torch.bfloat16)
    live = LiveBytes()
    with suppress(Exception), torch.no_grad():  # whatever a VAE says to the meta device
        latents = torch.empty(1, *teacher.call.to_vae(size).shape, dtype=torch.bfloat16, device="meta")
        with live:
            vae.decode(latents)
    return sum(tensor.nbytes for tensor in (*vae.parameters(), *vae.buffers())) + live.peak


class Meter:
    """Memory of units while they are trained; of units that are alike, one is measured.

    Args:
        checkpointing: recompute activations in the backward pass.
    """

    def __init__(self, checkpointing: bool) -> None:
        self.checkpointing = checkpointing
        self._known: dict[Hashable, int] = {}

    def __call__(self, unit: Unit, batch: UnitBatch) -> int:
        """Most bytes that a unit's training on a micro-batch takes, see `unit_activations`."""
        tensors = *unit.parameters(), *batch.inputs.values(), *batch.targets.values()
        alike = (type(unit), *(tensor.shape for tensor in tensors))
        if alike not in self._known:
            self._known[alike] = unit_activations(unit, batch, self.checkpointing)
        return self._known[alike]
