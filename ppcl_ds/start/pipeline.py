"""What a pipeline draws by itself, and what can be planned of its transformer: asked of its configurations alone."""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ppcl_ds.data.batch import Size
from ppcl_ds.data.guiding import Guiding
from ppcl_ds.data.text import Joining
from ppcl_ds.errors import UserError, missing
from ppcl_ds.planning.choose import width_candidates
from ppcl_ds.sections import Plan
from ppcl_ds.start.source import Look
from ppcl_ds.teacher.encoding import frames_read
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.pipeline_check import check
from ppcl_ds.teacher.pipeline_files import read_index
from ppcl_ds.teacher.pipeline_run import FRAMES
from ppcl_ds.teacher.replacing import ending, replaced
from ppcl_ds.teacher.surgery import shorten
from ppcl_ds.teacher.teacher import Teacher

SHARES = {"large": 0.3, "medium": 0.4, "small": 0.5}
"""What variants give up, where there are blocks enough for it; `recipes/folder_of_images.yaml` has them, too."""

_WORDS = "a caption of several words"


class Because(NamedTuple):
    """A value that was chosen, and why, for a comment."""

    value: Any
    why: str


def component_of(folder: Path) -> tuple[str, list[str]]:
    """The transformer that is pruned, and the others that the pipeline has.

    Raises:
        UserError: it is no pipeline folder, or has no transformer.
    """
    if not folder.is_dir():
        raise UserError(f"pipeline {missing(folder)}")
    index = read_index(folder)
    found = [name for name in index if name.startswith("transformer") and (folder / name).is_dir()]
    if not found:
        raise UserError(f"{folder}: it has no transformer, so there is nothing to prune")
    first, *others = sorted(found)
    return first, others


def side_of(call: PipelineCall, known: Size, source: int | None) -> tuple[Because, Because | None]:
    """Pixels of a side, and `images.step` where the usual one is too large.

    Args:
        known: a size that the pipeline can be asked for.
        source: pixels of a side of the source's images, if anybody has looked.

    Raises:
        UserError: the images are too small for it.
    """
    own, name = _own(call, known).height, type(call.pipe).__name__
    factor = int(getattr(call.pipe, "vae_scale_factor", None) or 8)
    least = 2 * factor
    usual = least if factor == 1 else max(64, least)
    if source is not None and source < least:
        raise UserError(f"source: its images have about {source} x {source} pixels; {name} needs {least} x {least}")
    wanted = own if source is None else min(own, source)
    step = usual if wanted >= usual else least
    side = max(step, (round(wanted / step) if wanted == own else wanted // step) * step)
    if wanted == own:
        why = f"of about {side} x {side} pixels, as {name} draws by itself"
    else:
        why = f"nine in ten of the source's images have so many pixels; {name} itself draws {own} x {own}"
    return Because(side, why), None if step == usual else Because(step, "two latents: 64 would be too coarse")


def frames_of(call: PipelineCall, side: int, known: Size, source: Look) -> Because | None:
    """Frames of a clip; None: the source has none, or the pipeline draws none.

    Args:
        side: pixels.
        known: a size that the pipeline can be asked for.

    Raises:
        UserError: the source has clips, and the pipeline draws images.
    """
    name = type(call.pipe).__name__
    if not call.draws_clips and source.noun == "clips":
        raise UserError(f"source: it has clips; {name} draws images")
    if not call.draws_clips or (source.frames is None and not source.captions):
        return None
    own = _own(call, known).frames
    if source.frames is None or source.frames >= own:  # the VAE is not asked: an encoder takes a minute for a clip
        return Because(own, f"as {name} draws by itself")
    found = frames_read(call, Size(side, side, source.frames))
    return Because(found, f"nine in ten clips have {source.frames}, of which its VAE reads so many; {name} draws {own}")


def _own(call: PipelineCall, known: Size) -> Size:
    """The square with as many pixels, and as many frames, as the pipeline draws if nobody says how large."""

    def asked(old: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        given = inspect.signature(old).bind(*args, **kwargs).arguments
        return given.get("height"), given.get("width")

    sides = ("height", "width", *FRAMES)
    own = {side: call.parameters[side].default for side in sides if side in call.parameters}
    height = width = None
    if hasattr(call.pipe, "prepare_latents"):
        with ExitStack() as stack, suppress(UserError):
            stack.enter_context(replaced(call.pipe, "prepare_latents", ending(asked)))
            height, width = call.run(stack, known, call.example(known), options=own)
    if not (isinstance(height, int) and isinstance(width, int)):
        height, width = known.height, known.width
    frames = next((own[name] for name in FRAMES if isinstance(own.get(name), int)), known.frames)
    return Size(math.isqrt(height * width), math.isqrt(height * width), frames)


def guidance_of(call: PipelineCall, size: Size) -> Because:
    """The pipeline's own scale of classifier-free guidance, where prompts that lie encoded can be drawn with it."""
    name = type(call.pipe).__name__
    known = [key for key in ("true_cfg_scale", "guidance_scale") if key in call.parameters]
    if call.embeds_guidance:
        return Because(1.0, f"none: the transformer of {name} reads guidance_scale as a number, which stays its own")
    key, scale = next(((key, call.parameters[key].default) for key in known), ("", None))
    if not isinstance(scale, int | float) or scale <= 1:
        return Because(1.0, f"none: {name} draws without classifier-free guidance unless told")
    try:
        asked = (_WORDS, 1.0), ("", 1.0), (_WORDS, 2.0)
        Guiding.learn(*(tuple(call.shapes(caption, size, by).text) for caption, by in asked))
    except (UserError, ValueError):
        return Because(1.0, f"none: what {name} reads with guidance cannot be made of prompts that lie encoded")
    return Because(float(scale), f"{key} of {name}")


def one_by_one(call: PipelineCall, size: Size) -> str:
    """Why samples are read one by one; empty: several can be read together."""
    if call.example(size).source:
        return "source images are read one by one"
    try:
        Joining.learn(*(tuple(call.shapes(text, size).text) for text in ("", _WORDS, ["", _WORDS])))
    except (UserError, ValueError):
        return "its prompts are read one by one"
    return ""


def variants_of(teacher: Teacher) -> Because:
    """Names of variants and what they give up.

    Raises:
        UserError: no block of it can be taken out, or what is left would compute something else.
    """
    most, name = _most(teacher), teacher.class_name
    if not most:
        why = teacher.keeps_its_blocks or "no two neighbours among its blocks are alike"
        raise UserError(f"{teacher.path}: no block of {name} can be taken out: {why} (`ppcl families` tells more)")
    first, last = min(teacher.plannable_spans)
    shorten(teacher, [block.index for block in teacher.blocks if not first < block.index <= last])
    named = {variant: share for variant, share in SHARES.items() if share <= most}
    named = named or {"small": max(0.01, math.floor(100 * most) / 100)}
    return Because(named, f"share of the block parameters given up; of {len(teacher.blocks)} blocks, {most:.0%} can go")


def _most(teacher: Teacher) -> float:
    """The largest share of the block parameters that spans can give up; a unit is as large as its first block."""
    sizes = [block.parameters for block in teacher.blocks]
    longest = Plan.model_fields["max_span"].default
    best = [0] * (len(sizes) + 1)  # of the blocks before each
    for last in range(len(sizes)):
        saved = (
            best[first] + sum(sizes[first + 1 : last + 1])
            for first, end in teacher.plannable_spans
            if end == last and last - first < longest
        )
        best[last + 1] = max(best[last], *saved, 0)
    return best[-1] / sum(sizes)


def width_of(teacher: Teacher) -> list[str]:
    """The kinds of width units that some block of it has what they need for."""
    kinds: tuple[Literal["ffn", "narrow", "text"], ...] = ("ffn", "narrow", "text")
    return [k for k in kinds if width_candidates(Plan(variants=SHARES, width=(k,)), teacher)]


def check_pipeline(call: PipelineCall, size: Size) -> None:
    """That the transformer can be asked, and that it is what the pipeline gives it while it draws.

    Raises:
        UserError: it is not.
    """
    if not callable(getattr(getattr(call.pipe, "vae", None), "encode", None)):
        raise UserError(f"{call.folder}: {type(call.pipe).__name__} has no VAE that encodes images")
    call.to_vae(size)
    call.to_step(size)
    check(call, call.example(size), size)
