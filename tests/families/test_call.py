"""Every tiny pipeline is asked, its latents mapped, its blocks taken out: against what the stock pipeline does."""

from __future__ import annotations

import copy
import functools
import inspect
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.files import find_class
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.pipeline_check import check
from ppcl_ds.teacher.pipeline_run import RUNGS, SOURCES
from ppcl_ds.teacher.surgery import lay_out
from ppcl_ds.teacher.teacher import Teacher
from tests.families.core import cases
from tests.families.pipelines import PIPELINES, TinyPipeline

STEPS, STEP = 3, 1


class _DrawnError(Exception):
    """The stock pipeline has drawn: its VAE was called."""


class Seen:
    """What happens inside a stock pipeline while it draws."""

    def __init__(self) -> None:
        self.text: list[Any] = []
        self.called: list[tuple[nn.Module, dict[str, Any]]] = []
        self.answered: list[Tensor] = []
        """What the transformer put out."""
        self.stepped: list[tuple[Tensor, Tensor]] = []
        """Latents before and after each step of the scheduler."""
        self.by: list[Tensor] = []
        """What it stepped by."""
        self.decoded: Tensor | None = None
        """What the VAE was given."""


def draw(pipe: Any, family: TinyPipeline) -> Seen:
    """Draw with the stock pipeline, and watch."""
    seen = Seen()
    encode, scheduler = pipe.encode_prompt, type(pipe.scheduler)
    step = scheduler.step

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        seen.text.append(encode(*args, **kwargs))
        return seen.text[-1]

    @functools.wraps(step)
    def scheduler_step(self: Any, output: Tensor, time: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = sample.clone()
        seen.by.append(output)
        stepped = step(self, output, time, sample, *args, **kwargs)
        seen.stepped.append((before, (stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample).clone()))
        return stepped

    def before(module: Any, args: Any, kwargs: Any) -> None:
        if len(seen.called) > len(seen.stepped):  # a second transformer, for guidance
            return
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        kept = {key: value for key, value in bound.items() if key != "self"}  # a loop may write into its latents
        seen.called.append((module, pytree.tree_map_only(Tensor, torch.clone, kept)))

    def after(module: Any, args: Any, output: Any) -> None:
        if len(seen.answered) <= len(seen.stepped):
            seen.answered.append(answer_of(output))

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.decoded = z
        raise _DrawnError

    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(pipe, "encode_prompt", encode_prompt)
        patch.setattr(scheduler, "step", scheduler_step)
        if getattr(pipe, "vae", None) is not None:
            patch.setattr(pipe.vae, "decode", decode)
        for name, part in pipe.components.items():
            if "transformer" in name and isinstance(part, nn.Module):
                stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(after).remove)
        torch.manual_seed(0)
        with suppress(_DrawnError):
            pipe(**family.call, num_inference_steps=STEPS, output_type="pt", generator=torch.Generator().manual_seed(0))
    if len(seen.stepped) == 2 * len(seen.called):  # a clip and its sound
        pairs = zip(seen.stepped[::2], seen.stepped[1::2], strict=True)
        seen.stepped = [(flat(a[0], b[0]), flat(a[1], b[1])) for a, b in pairs]
        seen.by = [flat(*pair) for pair in zip(seen.by[::2], seen.by[1::2], strict=True)]
    return seen


def answer_of(output: Any) -> Tensor:
    """What a transformer put out; a clip and its sound flat."""
    if isinstance(output, Tensor):
        return output
    first = output.sample if hasattr(output, "sample") else output[0]
    sound = [output[1]] if len(output) == 2 and isinstance(output[1], Tensor) else []
    return flat(torch.stack(first) if isinstance(first, list) else first, *sound)


def flat(*tensors: Tensor) -> Tensor:
    """One tensor as it is, several laid flat, one behind the other."""
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten(1) for tensor in tensors], 1)


def assert_equal(own: Any, others: Any) -> None:
    mine, tree = pytree.tree_flatten(own)
    theirs, other = pytree.tree_flatten(others)
    assert str(tree) == str(other)
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), (a - b).abs().max() if a.shape == b.shape else (a.shape, b.shape)
        else:
            assert a == b or a is b, (a, b)


REFUSED = {
    "cosmos": "cannot be asked",  # latents are scaled by the level
    "bria_fibo_edit": "cannot be asked",  # looks into its prompt
    "dit": "no method encode_prompt",
    "joyimage": "cannot be asked",  # its text encoder runs in another method
    "omnigen": "no method encode_prompt",
    "qwen_image_21_edit": "cannot be asked",  # its mask of pictures is looked at
    "qwen_layered": "cannot be asked",  # reads pictures with a fourth channel
    "sana_sprint": "asked",  # draws two steps or none
}
"""Pipelines that cannot be asked -> what the refusal says."""

NOT_SHORTENED: dict[str, str] = {
    "consisid": "no span of blocks",  # a face is attended to between blocks
    "bria_fibo": "no span of blocks",  # text of a layer of the encoder is put in before each block
    "hidream": "no span of blocks",  # likewise text
    "hunyuan_dit": "no span of blocks",
    "latte": "no list of blocks",
    "wan_animate": "no span of blocks",
}
"""Pipelines that can be asked, but whose transformer cannot lose a block -> what the refusal says."""

UNMAPPED = {
    "cogvideox15": "only a part",  # frames are cut off
    "cosmos_predict2": "cannot be asked",  # no rung at all is not possible
    "flux_fill": "cannot be asked",  # likewise
    "kandinsky5_i2v": "cannot be learned",  # frames are made like those that follow
    "latte": "only a part",  # and frames in pieces
    "wan_animate": "only a part",  # the first frame is the source's
}
"""Pipelines whose latents are not just rearranged on their way to the VAE -> what the refusal says."""

STOCHASTIC = {"allegro", "hunyuan_dit", "stable_audio"}
"""Their schedulers add new noise in every step, so no step lands anywhere."""

OTHER_LEVELS = {"cosmos_predict2", "helios"}
"""Their pipelines scale data and noise by themselves, or their schedulers have no rule for it."""

_STANDARD = {"prompt", "height", "width", "num_frames", "frames", "video_length", "guidance_scale", *SOURCES}


def options_of(family: TinyPipeline) -> dict[str, Any]:
    """What a pipeline has to be told beside what is drawn."""
    return {key: value for key, value in family.call.items() if key not in _STANDARD}


def opened(family: TinyPipeline, pipe: Any, folder: Path, component: str = "transformer") -> tuple[PipelineCall, Size]:
    """The saved pipeline as a caller, with what it needs to be told."""
    pipe.save_pretrained(folder)
    options = options_of(family)
    if getattr(pipe, component).config.get("guidance_embeds"):
        options |= {key: family.call[key] for key in ("guidance_scale",) if key in family.call}
    frames = next((family.call[key] for key in ("num_frames", "frames", "video_length") if key in family.call), 1)
    size = Size(family.call.get("height", 1), family.call.get("width", 1), frames)
    return PipelineCall(folder, component, options), size


def made(name: str) -> tuple[TinyPipeline, Any]:
    family = PIPELINES[name]
    if family.needs:
        pytest.importorskip(family.needs, reason="`make test-families` installs it")
    pipe = family.make()
    pipe.set_progress_bar_config(disable=True)
    return family, pipe


@pytest.mark.parametrize("name", cases(PIPELINES))
def test_a_pipeline(name: str, tmp_path: Path) -> None:
    family, pipe = made(name)
    if name in REFUSED and not hasattr(pipe, "encode_prompt"):
        with pytest.raises(UserError, match=REFUSED[name]):
            opened(family, pipe, tmp_path)
        return
    if name == "sana_sprint":  # draws two steps or none, so there is no third to ask for
        return
    seen = draw(pipe, family)
    module, expected = seen.called[STEP]
    [component] = [key for key, part in pipe.components.items() if part is module]
    call, size = opened(family, pipe, tmp_path, component)
    prompt = Prompt(seen.text)
    sources = [family.call[key] for key in SOURCES if key in family.call]
    if sources or "video" in family.call:
        encoder = PipelineCall(tmp_path, component, call.options, encodes="all")
        prompt = encoder.encode(family.call["prompt"], size, *sources[:1])
        assert_equal(list(prompt.text), seen.text)
        size = replace(size, source=prompt.source)
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):  # noqa: PT012 - as when data are encoded
            check(call, prompt, size)
            call.latents_shape(size)
        return
    check(call, prompt, size)
    passes_what_stock_passes(call, seen, prompt, size)
    if name in UNMAPPED:
        with pytest.raises(UserError, match=UNMAPPED[name]):
            maps_latents(call, seen, size)
    else:
        maps_latents(call, seen, size)
    draws_what_stock_draws(call, pipe, seen, prompt, size)
    if name in OTHER_LEVELS:
        with pytest.raises(UserError, match="its levels mean something else"):
            call.ladder(size)
    else:
        steps_by_what_is_learned(call, seen, size)
    if name not in OTHER_LEVELS | STOCHASTIC:
        steps_to_the_next_rung(call, size)
    teacher = Teacher(tmp_path / component, run=lambda model: model(**expected))
    if name in NOT_SHORTENED:
        with pytest.raises(UserError, match=NOT_SHORTENED[name]):
            shorter(teacher)
        return
    setattr(pipe, component, shorter(teacher))
    drawn = pipe(**family.call, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))
    assert all(bool(leaf.isfinite().all()) for leaf in pytree.tree_leaves(drawn[0]) if isinstance(leaf, Tensor))


def passes_what_stock_passes(call: PipelineCall, seen: Seen, prompt: Prompt, size: Size) -> None:
    """Argument for argument, without weights, from what was stored."""
    _, expected = seen.called[STEP]
    call.rungs = STEPS
    arguments = call.arguments(seen.stepped[STEP][0], STEP, prompt, size)
    call.rungs = RUNGS
    assert arguments.keys() == expected.keys()
    for key, value in expected.items():
        assert_equal(arguments[key], value)


def maps_latents(call: PipelineCall, seen: Seen, size: Size) -> None:
    """What the stock pipeline gives its VAE is the learned rearrangement of its last latents; and back."""
    if seen.decoded is None:
        return
    shape = call.latents_shape(size)
    layout = call.to_vae(size)
    last = seen.stepped[-1][1]
    assert last.shape == shape
    back = layout.inverse(seen.decoded, shape[1:])
    if call.own.noised:  # what is not decoded here is nothing but zero on the way back
        back = torch.where(back == 0, last, back)
    assert torch.allclose(back, last, atol=1e-4)
    if size.source is None or layout.scale.all():  # else a frame of the source stands in what the VAE reads
        assert torch.allclose(layout(last), seen.decoded, atol=1e-4)


def steps_by_what_is_learned(call: PipelineCall, seen: Seen, size: Size) -> None:
    """What the stock scheduler is given is the learned rearrangement of what the transformer put out."""
    assert seen.answered[STEP].shape[2:] == call.output_shape(size)[2:]  # tokens of the text may be among them
    assert torch.allclose(call.stepped_by(seen.answered[STEP], size).to(seen.by[STEP]), seen.by[STEP], atol=1e-4)


def draws_what_stock_draws(call: PipelineCall, pipe: Any, seen: Seen, prompt: Prompt, size: Size) -> None:
    """From the same noise, with the same transformers' answers."""

    def answer(module: Any, arguments: dict[str, Any]) -> Tensor:
        return answer_of(module(**arguments | {"return_dict": False}))

    answers = {name: functools.partial(answer, getattr(pipe, name)) for name in call.transformers()}
    latents, _ = call.draw(answers, seen.stepped[0][0], prompt, size, STEPS)
    assert torch.allclose(latents, seen.stepped[-1][1], atol=1e-4)


def steps_to_the_next_rung(call: PipelineCall, size: Size) -> None:
    """Noise is the scheduler's own; one step by the true target lands on the same data with the next rung's noise."""
    ladder = call.ladder(size)
    generator = torch.Generator().manual_seed(2)
    clean, noise = (torch.randn(call.latents_shape(size), generator=generator) for _ in range(2))
    for rung, pure in ((0, noise), (len(ladder) - 1, clean)):
        assert torch.corrcoef(torch.stack([ladder.noisy(clean, noise, rung).flatten(), pure.flatten()]))[0, 1] > 0.9
    for rung in (100, 800):
        scheduler = copy.deepcopy(ladder.scheduler)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(rung)
        before, after = (ladder.noisy(clean, noise, number) for number in (rung, rung + 1))
        target = ladder.target(clean, noise, rung)
        landed = scheduler.step(target, ladder.times[rung], before, return_dict=False)[0]
        assert float((landed - after).norm()) < 0.05 * float((after - before).norm()) + 1e-5
        for to, there in ((rung + 1, after), (len(ladder), clean)):
            torch.testing.assert_close(ladder.step(before, target, rung, to), there, rtol=1e-3, atol=1e-3)


def shorter(teacher: Teacher) -> Any:
    """A stock model without one block, the first that the class can do without."""
    refusal = UserError("no span of blocks")
    for first in sorted({u for u, v in teacher.plannable_spans if v == u + 1}):
        try:
            config, sources = lay_out(teacher, [(b.index, None) for b in teacher.blocks if b.index != first + 1])
            break
        except UserError as fault:
            refusal = fault
    else:
        raise refusal
    model = find_class(config["_class_name"]).from_config(config).eval()
    model.load_state_dict({key: source.load() for key, source in sources.items()})
    return model.requires_grad_(False)
