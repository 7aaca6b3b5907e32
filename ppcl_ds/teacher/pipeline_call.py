"""The stock pipeline as the caller of its transformer.

For one sample the pipeline's own `__call__` runs with three of its methods replaced: `encode_prompt` returns what it
returned when the caption was encoded, `prepare_latents` returns our noisy latents, and the scheduler keeps the one rung
of its ladder that was drawn. A hook on the transformer, which is empty, takes the arguments and ends the call. So
packing, position ids, masks, guidance vectors and shift by resolution are upstream's, whatever the family.
Shapes: latents are as the scheduler steps them, B samples: (B, ...).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.flows import arguments_of
from ppcl_ds.teacher.ladder import Ladder
from ppcl_ds.teacher.pipeline_look import Arguments, PipelineLook
from ppcl_ds.teacher.rearrangement import Rearrangement
from ppcl_ds.teacher.replacing import Asked, ending, replaced, stepped_by, the_first
from ppcl_ds.teacher.weightless import SaysCpu


def _alone(old: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any]:
    """What a method returns, as a pipeline would that makes nothing else."""
    return (old(*args, **kwargs),)


class PipelineCall(PipelineLook):
    """A pipeline folder as its transformer's caller; see `PipelineRun` for its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ladders: dict[Size, Ladder] = {}
        self._ranges: dict[Size, range] = {}

    def reads_both(self, scale: float) -> bool:
        """Whether guidance at a scale is made of two forwards, with the prompt and without."""
        return scale > 1 and not self.embeds_guidance

    @contextmanager
    def told(self, options: Mapping[str, Any]) -> Iterator[None]:
        """Inside, every call of the pipeline has these arguments, too."""
        before, self.options = self.options, self.options | dict(options)
        try:
            yield
        finally:
            self.options = before

    def arguments(self, latents: Tensor, rung: int, prompt: Prompt, size: Size) -> Arguments:
        """What the stock pipeline gives its transformer for one sample.

        Args:
            latents: (1, ...) noisy.
            rung: of the ladder for `size`.
            prompt: of its caption.

        Raises:
            UserError: the pipeline asks another of its transformers at this rung, or none.
        """
        module, arguments = self.asked(latents, rung, prompt, size)
        if module is not self.transformer:
            raise UserError(
                f"{self.folder}: at rung {rung} of {self.rungs} another transformer than {self.component} is asked"
            )
        return arguments

    def asked(self, latents: Tensor, rung: int, prompt: Prompt, size: Size) -> tuple[nn.Module, Arguments]:
        """The same, and which transformer was asked."""

        def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise Asked((module, arguments_of(module, args, kwargs)))

        with ExitStack() as stack:
            for module in self.transformers().values():
                stack.callback(module.register_forward_pre_hook(stop, with_kwargs=True).remove)
            return self.run(stack, size, prompt, latents, rung)

    def draw(
        self,
        answers: Mapping[str, Callable[[Arguments], Any]],
        noise: Tensor,
        prompt: Prompt,
        size: Size,
        steps: int,
        guidance: float = 1.0,
        decode: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw by the stock pipeline's own loop.

        Args:
            answers: component -> what a transformer puts out for arguments; its first output alone.
            noise: (B, ...) that it begins with.
            prompt: of B captions, joined; if `guidance` is above 1, as they are read with guidance.
            decode: latents as the VAE reads them to images; None: they are not decoded.

        Returns:
            The latents (B, ...), and the images (B, 3, height, width) or clips (B, frames, 3, height, width) in [0, 1].

        Raises:
            UserError: the pipeline asks a transformer that has no answer, or cannot draw.
        """
        newest, left = noise, steps
        self.output_shape(size)  # and whether it is a list

        def answer(name: str, old: Callable[..., Any]) -> Callable[..., Any]:
            module = old.__self__  # type: ignore[attr-defined]

            def forward(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
                if name not in answers:
                    raise UserError(f"{self.folder}: its {name} is asked, too, and is not there")
                arguments = arguments_of(module, args, kwargs)
                with SaysCpu.silent():
                    output = answers[name](arguments)
                return self.as_output(output, return_dict, size)

            return forward

        def keep(latents: Tensor) -> None:
            nonlocal newest, left
            newest, left = latents, left - 1
            if decode is None and not left:
                raise Asked(latents)

        def decoded(old: Callable[..., Any]) -> Callable[..., Any]:
            def vae_decode(latents: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
                assert decode is not None
                images = decode(latents, *args, **kwargs)
                return SimpleNamespace(sample=images) if return_dict else (images,)

            return vae_decode

        with ExitStack() as stack:
            stack.enter_context(self.stepping(steps))
            stack.enter_context(self._watching(after=keep))
            for name, module in self.transformers().items():
                stack.enter_context(replaced(module, "forward", functools.partial(answer, name)))
            if decode is not None:
                stack.enter_context(replaced(self.pipe.vae, "decode", decoded))
                if self.own.noised:  # other kinds of latents would be decoded behind
                    processor = self.pipe.video_processor
                    stack.enter_context(replaced(processor, "postprocess_video", ending(_alone)))
            output_type = "latent" if decode is None else "pt"
            options = self.guided(guidance)
            found = self.run(
                stack, size, prompt, noise, whole=True, options=options, output_type=output_type, ends=False
            )
        return newest, None if decode is None else found[0]

    def ladder(self, size: Size) -> Ladder:
        """The scheduler's rungs for a size."""
        if size not in self._ladders:

            def set_at(old: Callable[..., Any], *args: Any, **kwargs: Any) -> Ladder:
                old(*args, **kwargs)
                return Ladder(copy.deepcopy(self.pipe.scheduler))

            with ExitStack() as stack:
                stack.enter_context(replaced(self.pipe.scheduler, "set_timesteps", ending(set_at)))
                self._ladders[size] = self.run(stack, size, self.example(size))
        return self._ladders[size]

    def own_rungs(self, size: Size) -> range:
        """The rungs at which the pipeline asks this transformer: all, or those on one side of a boundary.

        Raises:
            UserError: it asks it nowhere.
        """
        if size not in self._ranges:
            latents = torch.zeros(self.latents_shape(size))

            def asks(rung: int) -> bool:
                return self.asked(latents, rung, self.example(size), size)[0] is self.transformer

            first, last = 0, len(self.ladder(size)) - 1
            at_first, at_last = asks(first), asks(last)
            if not (at_first or at_last):
                raise UserError(f"{self.folder}: {type(self.pipe).__name__} never asks its {self.component}")
            while at_first != at_last and last - first > 1:
                middle = (first + last) // 2
                first, last = (middle, last) if asks(middle) == at_first else (first, middle)
            end = len(self.ladder(size))
            both = at_first and at_last
            self._ranges[size] = range(end) if both else range(last) if at_first else range(last, end)
        return self._ranges[size]

    def to_vae(self, size: Size) -> Rearrangement:
        """From the scheduler's latents to what the VAE decodes.

        Raises:
            UserError: it is more than a rearrangement.
        """

        def decoded(latents: Tensor) -> Tensor:
            with ExitStack() as stack:
                stack.enter_context(replaced(self.pipe.vae, "decode", ending(the_first)))
                return self.run(stack, size, self.example(size), latents, None, output_type="pt")

        drawn_from = bool(self.example(size).source)  # of which the VAE may be given a frame, too
        whole = not self.own.noised
        return self._learned(("the VAE decodes", size), decoded, self.latents_shape(size), whole, drawn_from)

    def stepped_by(self, output: Tensor, size: Size) -> Tensor:
        """Of what the transformer put out, (B, ...), what the scheduler steps by, (B, ...)."""
        return self.to_step(size, output.shape)(output)

    def to_step(self, size: Size, shape: Sequence[int] | None = None) -> Rearrangement:
        """From the transformer's output to what the scheduler steps by.

        Args:
            shape: of the output, (B, ...); None: of the example's. Qwen-Image 2.1 also puts out its text.

        Raises:
            UserError: it is more than a rearrangement.
        """

        def stepped(output: Tensor) -> Tensor:
            latents, rung = torch.zeros(self.latents_shape(size)), self.own_rungs(size)
            with ExitStack() as stack:
                stack.enter_context(replaced(self.pipe.scheduler, "step", stepped_by(self.own.kinds)))
                self._answer(stack, output, size)
                return self.run(stack, size, self.example(size), latents, rung[len(rung) // 2])

        shape = (1, *(shape or self.output_shape(size))[1:])
        return self._learned(("the scheduler steps by", size, shape), stepped, shape, whole=False)
