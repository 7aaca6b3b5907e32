"""`ppcl init`: from a pipeline folder and a source to a recipe that runs, with a reason beside every value."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl_ds.atomic import atomic_write
from ppcl_ds.data.batch import Size
from ppcl_ds.errors import UserError
from ppcl_ds.estimate.numbers import Estimate
from ppcl_ds.hub import pipeline_folder
from ppcl_ds.pages import render
from ppcl_ds.recipe import Recipe, load_recipe
from ppcl_ds.start.fitting import Machine, Setting, fitted, machine, probing
from ppcl_ds.start.pipeline import (
    Because,
    check_pipeline,
    component_of,
    frames_of,
    guidance_of,
    one_by_one,
    side_of,
    variants_of,
    width_of,
)
from ppcl_ds.start.source import LOOKED, Look, look
from ppcl_ds.teacher.noising import DTYPES
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.meta_forward import meta_forward

_BATCH = 64
"""Samples of an optimizer step, as in the recipes that ship."""


def init(pipeline: Path, source: str, out: Path | None, gpus: int | None, gpu_memory: float | None) -> None:
    """Look at everything, write the recipe, print what comes next.

    Args:
        pipeline: its folder, or its id on the Hugging Face hub.
        out: the recipe; None: in this folder, called as the pipeline's.
        gpus: of the whole run; None: those of this machine; 0: none.
        gpu_memory: GB of each; None: as of this machine's.

    Raises:
        UserError: the recipe is there already, something cannot be used as what it is given for, or the GPUs are too
            small; one line that says which.
    """
    out = out or Path(f"{pipeline.resolve().name}.yaml")
    if out.exists():
        raise UserError(f"--out {out}: it is there already, and is not overwritten; give another name")
    given, images = machine(gpus, gpu_memory), look(source)
    folder = pipeline_folder(pipeline)
    component, others = component_of(folder)
    asked = Teacher(folder, False, component=component)
    size, step = side_of(asked.call, asked.size, images.side)
    of_gpus, of_cpu = Because("bf16", "half the memory of fp32"), Because("fp32", "the CPU's own; bf16 on GPUs")
    precision = of_gpus if given.gpus else of_cpu
    frames = frames_of(asked.call, size.value, asked.size, images)
    square = Size(size.value, size.value, frames.value if frames else 1)
    teacher = Teacher(folder, False, component=component, dtype=DTYPES[precision.value], size=square)
    check_pipeline(asked.call, square)  # in float32, as layouts are learned
    values: dict[str, Any] = {
        "teacher": f"{teacher.class_name} of a {type(asked.call.pipe).__name__}",
        "machine": given,
        "gpus": given.gpus,
        "nodes": given.nodes,
        "per_node": given.world // given.nodes,
        "run": json.dumps(f"runs/{out.stem}"),
        "path": json.dumps(str(pipeline), ensure_ascii=False),
        "source": json.dumps(source, ensure_ascii=False),
        "component": component,
        "others": others,
        "precision": precision,
        "size": size,
        "step": step,
        "frames": frames,
        "drawn": square,
        "max_aspect": _max_aspect(images),
        "heldout": _heldout(images),
        "captions": images.captions,
        "variants": variants_of(asked),
        "width": width_of(teacher),
        "drawing_steps": _drawing_steps(asked),
        "guidance": guidance_of(asked.call, square),
    }
    values |= {"smallest": max(values["variants"].value, key=values["variants"].value.get)}
    values |= _training(teacher, square, given.gpus > 0)
    draft = _Draft(values, given, images)
    alone = one_by_one(asked.call, square)
    setting, found = fitted(given, lambda each: draft.recipe(draft.text(each)), teacher, square, bool(alone))
    text = draft.text(setting, found, alone)
    draft.recipe(text)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, text)
    except OSError as fault:
        raise UserError(f"--out {out}: {fault.strerror}") from None
    print(f"wrote {out}; read it, then:")
    steps = ("ppcl-data shard", "ppcl-data encode", "ppcl probe", "ppcl plan", "ppcl distill", "ppcl consolidate")
    every = ("ppcl-data shard", "ppcl submit") if given.nodes > 1 else (*steps, "ppcl evaluate")
    print("\n".join(f"  {command} {out}" for command in every))


@dataclass(frozen=True)
class _Draft:
    """The recipe but for how it is laid over the GPUs.

    Attributes:
        values: of the template.
    """

    values: dict[str, Any]
    machine: Machine
    images: Look

    def text(self, setting: Setting, found: Estimate | None = None, alone: str = "") -> str:
        """The recipe with a setting, and with what was estimated of it."""
        micro_batch, world = setting.micro_batch, self.machine.world
        tuning = min(2, micro_batch)
        probe = probing(found, micro_batch) if found else micro_batch
        one, more = "all units fit on each process, so nothing is sent", "on fewer, the units do not fit"
        return render(
            "ppcl_ds.start",
            "recipe.yaml.jinja",
            **self.values,
            stages=setting.stages,
            stages_why=one if setting.stages == 1 else more,
            replicas=world // setting.stages,
            micro_batch=micro_batch,
            micro_batch_why=_said(found, alone) if found else "",
            micro_batches=_filling(micro_batch, world),
            tuning_batch=tuning,
            tuning_batches=_filling(tuning, world),
            probe_batch=probe,
            checkpointing=setting.checkpointing,
            offload=setting.offload,
            whole=setting.whole,
            batches=self._batches(probe),
        )

    def recipe(self, text: str) -> Recipe:
        """The text as a recipe."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "recipe.yaml")
            path.write_text(text)
            return load_recipe(path)

    def _batches(self, micro_batch: int) -> Because:
        """Half of them should have several times more tokens than the teacher has channels."""
        tokens, channels = self.values["tokens"], self.values["channels"]
        samples = max(256, -(-8 * channels // tokens))
        there = self.images.samples
        if there is not None and there < samples:
            why = f"once through the {self.images.noun}; more of them would make it surer"
            return Because(max(2, there // micro_batch), why)
        times = samples // 2 * tokens / channels
        why = f"{samples} samples: half of them have {times:.3g} times as many tokens as the teacher has channels"
        return Because(-(-samples // micro_batch), why)


def _filling(micro_batch: int, world: int) -> int:
    """Micro-batches of a step, over all processes."""
    return -(-_BATCH // (micro_batch * world)) * world


def _said(found: Estimate, alone: str) -> str:
    """What the estimate said of a setting."""
    usable = found.accelerator.usable_bytes
    said = f"`ppcl estimate`: {found.memory.peak / 2**30:.3g} of the {usable / 2**30:.3g} GiB that may be filled"
    said = f"{alone}; {said}" if alone else said
    return f"{said}, with spans assumed"


def _training(teacher: Teacher, size: Size, on_gpus: bool) -> dict[str, Any]:
    """How long, at which learning rate, and what is known of a forward."""
    capture = meta_forward(teacher, size).capture
    tokens, channels = capture.streams[0]["image"].shape[1:]
    lr = float(f"{min(6e-3, max(2e-5, 0.3 / channels)):.0e}")
    why = f"for {channels} channels, between what the recipes that ship take: 1e-4 for 3072, 6e-3 for 64"
    steps, period = (3000, 250) if on_gpus else (600, 100)
    longer = "more of them pay (docs/quality.md)"
    shipped = "recipes/folder_of_images.yaml" if on_gpus else "recipes/digits.yaml on the CPU"
    return {
        "tokens": tokens,
        "channels": channels,
        "lr": Because(f"{lr:.1e}", why),
        "tuning_lr": f"{lr / 10:.1e}",
        "tuning_steps": steps // 3,
        "warmup": steps // 30,
        "steps": Because(steps, f"as {shipped}; {longer}"),
        "sample_every": 2 * period,
        "checkpoint_every": period,
    }


def _max_aspect(images: Look) -> Because:
    if images.captions:
        return Because(1.0, "there are no images")
    if not images.images:
        return Because(2.0, "the source was not looked at; 1: squares alone")
    if images.squares:
        return Because(1.0, f"the first {len(images.images)} {images.noun} are squares, or nearly")
    return Because(2.0, f"the first {len(images.images)} {images.noun} are not all squares: buckets from 1:2 to 2:1")


def _heldout(images: Look) -> Because:
    there = images.samples
    if there is None:
        return Because(0.05, f"a dozen of the first {LOOKED} {images.noun}, and more of more, for the figures")
    share = min(0.25, max(0.05, math.ceil(1600 / there) / 100))
    return Because(share, f"about {share * there:.0f} of {there} {images.noun}, for the figures")


def _drawing_steps(teacher: Teacher) -> Because:
    call = teacher.call
    default = getattr(call.parameters.get("num_inference_steps"), "default", None)
    if isinstance(default, int):
        return Because(default, f"num_inference_steps of {type(call.pipe).__name__}")
    return Because(20, f"{type(call.pipe).__name__} has no number of its own")
