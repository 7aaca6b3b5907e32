"""What every step of the road costs, from encoding to evaluation, and what it leaves on the disk.

Arithmetic at the share of the accelerator's peak that an estimate assumes; for the steps that train, traffic, too. Left
out are reading data, loading models and compiling, and what takes no accelerator: sharding, choosing, consolidating.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ppcl_ds.data.batch import Size
from ppcl_ds.data.index import Index
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.inputs import Inputs
from ppcl_ds.estimate.numbers import Estimate, RoadStep
from ppcl_ds.estimate.whole import IMAGES
from ppcl_ds.planning.choose import width_candidates
from ppcl_ds.planning.swaps import SETS
from ppcl_ds.probing.costs import worthwhile_parts
from ppcl_ds.teacher.comparison import measures_of
from ppcl_ds.teacher.encoding import mean_of
from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.weightless import WithoutWeights
from ppcl_ds.training.checks import checkpoint_bytes
from ppcl_ds.training.meta_forward import MetaForward
from ppcl_ds.units.kinds import parameters_saved

_STORED = 2
"""Bytes of a number that is encoded: bfloat16."""


@dataclass(frozen=True)
class Walked:
    """A run whose whole road is asked about.

    Attributes:
        forward: of the teacher, on a micro-batch.
        distilling: its distillation.
        tunings: by variant.
        price: of an accelerator hour; None: nobody named it.
    """

    inputs: Inputs
    forward: MetaForward
    distilling: Estimate
    tunings: Mapping[str, Estimate]
    price: float | None


@dataclass(frozen=True)
class Coding:
    """What one sample costs the pipeline's encoders and its VAE.

    Attributes:
        encode, decode: FLOPs.
        stored: bytes of its latents and its caption.
    """

    encode: float
    decode: float
    stored: int


def with_road(found: Estimate, walked: Walked) -> Estimate:
    """The estimate of a distillation with all other steps, and what they leave on the disk."""
    coding = coding_of(walked.inputs.teacher.call, walked.inputs.size)
    samples, known = _samples(walked)
    steps = tuple(_priced(step, walked.price) for step in _steps(walked, coding, samples, known))
    return found.model_copy(update={"road": steps, "disk": dict(_disk(walked, coding, samples, known))})


@torch.no_grad()
def coding_of(call: PipelineCall, size: Size) -> Coding:
    """Count it, without weights.

    Args:
        size: of the sample.
    """
    with WithoutWeights(), FlopCounterMode(display=False) as counter:
        prompt = call.without_weights(size, 1)
    text = counter.get_total_flops()
    bits, vae = [tensor.numel() for tensor in prompt.tensors()], call.pipe.vae
    for frames in ([size.frames], []) if size.frames > 1 else ([], [1]):  # some VAEs read images as clips
        with suppress(ValueError, RuntimeError, TypeError, IndexError), WithoutWeights():
            pixels = torch.zeros(1, 3, *frames, size.height, size.width, dtype=vae.dtype, device=vae.device)
            there, latents = _flops_of(vae, "encode", pixels)
            back, _ = _flops_of(vae, "decode", mean_of(latents))
            return Coding(text + there, back, _STORED * (sum(bits) + mean_of(latents).numel()))
    return Coding(text, 0.0, _STORED * (sum(bits) + call.latents_shape(size).numel()))


def _flops_of(vae: nn.Module, method: str, given: torch.Tensor) -> tuple[int, object]:
    with FlopCounterMode(display=False) as counter:
        made = getattr(vae, method)(given)
    return counter.get_total_flops(), made


def _samples(walked: Walked) -> tuple[int, str]:
    """How many samples there are, and how that is known."""
    data, found = walked.inputs.recipe.data, walked.distilling
    for stage, command in (("encoded", "ppcl-data encode"), ("raw", "ppcl-data shard")):
        with suppress(UserError):
            return Index.read(data.shards / stage / "index.json", command).samples, f"as {stage}"
    return min(IMAGES, walked.inputs.recipe.distill.steps * found.samples), "assumed"


def _steps(walked: Walked, coding: Coding, samples: int, known: str) -> Iterator[RoadStep]:
    inputs, found = walked.inputs, walked.distilling
    recipe, cluster, world = inputs.recipe, found.cluster, found.cluster.world
    rate = found.accelerator.tflops * 1e12 * found.utilisation
    settings, drawing = recipe.distill, recipe.evaluate
    tasks = recipe.cluster.encode_tasks if cluster.nodes > 1 else 1
    flops = samples * coding.encode
    yield RoadStep(
        name="encode",
        work=f"{samples:,} samples ({known})",
        flops=flops,
        seconds=flops / rate / tasks,
        accelerators=tasks,
    )
    if probing := found.probing:
        yield RoadStep(
            name="probe",
            work=f"{probing.samples:,} samples, {probing.passes} pass{'es' * (probing.passes > 1)}",
            flops=probing.teacher_flops + probing.moment_flops + probing.figure_flops,
            seconds=found.probing_seconds,
            accelerators=world,
        )
    teacher = walked.forward.flops_until[-1] / settings.micro_batch
    guided = drawing.guidance > 1 and not inputs.teacher.call.embeds_guidance
    if recipe.plan.width or recipe.plan.candidates:  # measured with --from-run
        units = len(inputs.plan.units) + len(width_candidates(recipe.plan, inputs.teacher))
        asked = -(-drawing.velocity_batches // world) * world * drawing.batch_size
        if "draw" in measures_of(recipe, inputs.teacher.call):
            asked += drawing.few_steps * recipe.plan.prompts
        flops = (units + SETS + 2) * asked * (1 + guided) * teacher
        work = f"--from-run: {units} units, {SETS} sets"
        yield RoadStep(name="plan", work=work, flops=flops, seconds=flops / rate / world, accelerators=world)
    else:
        yield RoadStep(name="plan", work="on a CPU", flops=0, seconds=0, accelerators=0)
    for name, each, steps in (
        ("distill", found, settings.steps),
        *((f"finetune {name}", each, recipe.tuning.steps) for name, each in walked.tunings.items()),
    ):
        yield RoadStep(
            name=name,
            work=f"{steps:,} steps of {each.samples} samples",
            flops=steps * each.step_flops,
            seconds=steps * each.seconds,
            accelerators=world,
        )
    models = 1 + sum(share * times for _, share, times in _variants(walked))
    forwards = drawing.samples * drawing.steps * (1 + guided) + drawing.velocity_batches * drawing.batch_size
    drawn = 1 + sum(times for _, _, times in _variants(walked))
    flops = models * forwards * teacher + drawn * drawing.samples * coding.decode
    sets = "; prompt sets not counted" if drawing.sets else ""
    yield RoadStep(
        name="evaluate",
        work=f"{drawn} models x {drawing.samples} samples, {drawing.steps} steps{sets}",
        flops=flops,
        seconds=flops / rate,
        accelerators=1,
    )


def _variants(walked: Walked) -> Iterator[tuple[str, float, int]]:
    """Name of each variant, its share of the teacher's FLOPs, and how many models of its shape are evaluated: itself,
    undistilled, and fine-tuned."""
    forward, plan = walked.forward, walked.inputs.plan
    blocks, shares = sum(forward.block_flops), walked.inputs.recipe.plan.variants
    for name in _names(walked):
        kept = 1 - shares.get(name, 0.0)
        if name in plan.variants:
            gone = blocks - sum(forward.block_flops[block] for block, _ in plan.places(name))
            kept = 1 - gone / forward.flops_until[-1]
        yield name, kept, 2 + (name in walked.tunings)


def _names(walked: Walked) -> list[str]:
    """Of the variants: those that the recipe asks for, or the plan's, where the recipe names none."""
    return list(walked.inputs.recipe.plan.variants or walked.inputs.plan.variants)


def _disk(walked: Walked, coding: Coding, samples: int, known: str) -> Iterator[tuple[str, int]]:
    """What is large, in bytes; checkpoints with the one that is being written."""
    inputs, found = walked.inputs, walked.distilling
    recipe, seen = inputs.recipe, inputs.seen
    yield "encoded shards", seen.bytes if seen and known == "as encoded" else samples * coding.stored
    if found.probing and (parts := worthwhile_parts(recipe, found.probing, found.probing_seconds)) > 1:
        yield f"probe, {parts} parts", parts * found.probing.part
    checkpoints = (recipe.distill.keep_checkpoints + 1) * checkpoint_bytes(found.parameters, average=False)
    if recipe.finetune:
        trained = checkpoint_bytes(sum(each.parameters for each in walked.tunings.values()), bool(recipe.finetune.ema))
        checkpoints += (recipe.finetune.keep_checkpoints + 1) * trained
    yield "checkpoints", checkpoints
    size, whole = DTYPES[recipe.teacher.precision].itemsize, found.teacher_parameters
    each = {name: int(size * (whole - _given_up(walked, name))) for name in _names(walked)}
    yield "variants", sum(each[name] * (1 + (name in walked.tunings)) for name in each)


def _given_up(walked: Walked, variant: str) -> float:
    """Parameters of the teacher that a variant lacks: the share that the recipe asks for, else what its units save."""
    teacher, shares, plan = walked.inputs.teacher, walked.inputs.recipe.plan.variants, walked.inputs.plan
    if variant in shares:
        return shares[variant] * teacher.anatomy.block_parameters
    return sum(parameters_saved(unit, teacher) for unit in plan.units_of(variant))


def _priced(step: RoadStep, price: float | None) -> RoadStep:
    cost = None if price is None else price * step.accelerator_hours
    return step.model_copy(update={"cost": cost})
