"""The stock pipeline run on what was stored, with its encoders and its noise replaced, until something ends it.

Nothing of it is loaded but configurations, tokenizers and the scheduler: its models are empty. So it can be asked with
weights nowhere, and made to encode captions into tensors of the right shapes.
Shapes: latents are as the scheduler steps them, B samples: (B, ...).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ppcl_ds import memory
from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.text import Tree
from ppcl_ds.errors import UserError, brief
from ppcl_ds.teacher.own import own_of
from ppcl_ds.teacher.pipeline_files import Encodes, encoders, open_pipeline, read_index
from ppcl_ds.teacher.rearrangement import Rearrangement
from ppcl_ds.teacher.replacing import Asked, answering, instead_of_its_own, next_of, noting, replaced, with_zeros
from ppcl_ds.teacher.weightless import SaysCpu, WithoutWeights

RUNGS = 1000
"""Rungs of the ladder that places are drawn on."""

SOURCES = ("image", "control_image")
"""Arguments of a pipeline that take a source image; where they may be left out, an option `image: source` gives one."""

FRAMES = ("num_frames", "frames", "video_length")
"""Arguments of a pipeline that say how many frames a clip has."""

_CAPTIONS = (
    "a photograph of a red house by a lake in the mountains, with snow on its roof, on a sunny morning in winter",
    "a cat",
)
"""They stand for captions that are not there: one of usual length, and one for pipelines that read little."""

_ANY = "a caption"
"""Where it was encoded before. Not empty: Qwen-Image-Layered would ask its text encoder for another."""


class PipelineRun:
    """A pipeline folder that can be run without its weights.

    Args:
        folder: the pipeline; configurations, tokenizers and the scheduler are enough.
        component: the transformer, where there are two.
        options: arguments of the pipeline's `__call__` that differ from those without guidance.
        encodes: what will be encoded; what that needs is loaded whole.
        device: where those are.
        dtype: of those, and of the transformers, which are empty.

    Attributes:
        transformer: empty.
        entering: by size, from what `prepare_latents` gives to what the scheduler steps, where that is not the same.
        edits: whether it is known that it draws from a source image: its call requires one, or an option says so.

    Raises:
        UserError: it is no pipeline folder, or one whose transformer is not called as others are.
    """

    def __init__(
        self,
        folder: Path,
        component: str = "transformer",
        options: Mapping[str, Any] | None = None,
        encodes: Encodes = "nothing",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder, self.component, self.dtype = folder, component, dtype
        listed = read_index(folder).get(component) or [None, None]
        self.own = own_of(str(listed[1]))
        loaded = self.own.real if encodes == "nothing" else encoders(folder, encodes)
        self.pipe = open_pipeline(folder, loaded, device, dtype)
        self.transformer: Any = getattr(self.pipe, component, None)
        if not isinstance(self.transformer, nn.Module):
            raise UserError(f"{folder}: it has no component '{component}'")
        self.parameters = inspect.signature(type(self.pipe).__call__).parameters
        if not hasattr(self.pipe, "encode_prompt"):
            raise UserError(f"{folder}: {type(self.pipe).__name__} has no method encode_prompt, so it cannot be asked")
        given = self._known(options or {})
        asked = [given.pop(name) for name in SOURCES if name in given]
        self.edits = bool(asked) or self._needs_a_source
        own = {name: value for name, value in self.own.options.items() if name in self.parameters}
        self.options = self._unguided() | own | given
        self.rungs = RUNGS
        self._examples: dict[tuple[Size, int], Prompt] = {}
        self.entering: dict[Size, Rearrangement] = {}

    def _known(self, options: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in options.items():
            if name not in self.parameters:
                raise UserError(f"teacher.options: {type(self.pipe).__name__} takes no argument '{name}'")
            if name in SOURCES and value != "source":
                raise UserError(
                    f"teacher.options: {name} can only be `source`, which is every sample's own source image"
                )
        return dict(options)

    def _unguided(self) -> dict[str, Any]:
        """One forward a step, with its prompt."""
        off = {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "use_resolution_binning": False}
        return {
            key: value
            for key, value in off.items()
            if key in self.parameters and not (self.embeds_guidance and key == "guidance_scale")
        }

    @property
    def embeds_guidance(self) -> bool:
        """Whether the transformer takes the scale of guidance as a number."""
        return bool(self.transformer.config.get("guidance_embeds"))

    def guided(self, scale: float) -> dict[str, Any]:
        """Options for classifier-free guidance; of a transformer that takes the scale as a number, just that.

        Raises:
            UserError: the pipeline has none.
        """
        if scale <= 1:
            return {}
        by_two = "true_cfg_scale" in self.parameters and not self.embeds_guidance
        name = "true_cfg_scale" if by_two else "guidance_scale"
        if name not in self.parameters:
            raise UserError(
                f"{self.folder}: {type(self.pipe).__name__} draws without guidance; set evaluate.guidance: 1"
            )
        # An empty text: some pipelines guide only if they are given one.
        negative = {"negative_prompt": ""} if "negative_prompt" in self.parameters and not self.embeds_guidance else {}
        return {name: scale} | negative

    @contextmanager
    def stepping(self, rungs: int) -> Iterator[None]:
        """Inside, the pipeline draws in so many steps."""
        before, self.rungs = self.rungs, rungs
        try:
            yield
        finally:
            self.rungs = before

    def transformers(self) -> dict[str, Any]:
        """Every transformer by its component's name."""
        parts = self.pipe.components.items()
        return {name: part for name, part in parts if isinstance(part, nn.Module) and "transformer" in name}

    def encode(
        self, captions: str | list[str], size: Size, source: Image.Image | None = None, guidance: float = 1.0
    ) -> Prompt:
        """What the pipeline makes of a caption, and of a source image; of several captions, together.

        Args:
            guidance: with which it is to be read.

        Raises:
            UserError: it cannot; see `encodes`.
        """
        try:
            return self._encoded(captions, size, source, guidance)
        except UserError:
            if source is None or isinstance(captions, str):
                raise
            return self._encoded(captions, size, [source] * len(captions), guidance)  # some read an image each

    def _encoded(
        self, captions: str | list[str], size: Size, source: Image.Image | list[Image.Image] | None, guidance: float
    ) -> Prompt:
        text: list[Tree] = []
        images: list[Tree] = []
        first = source[0] if isinstance(source, list) else source

        def stop(module: Any, args: Any, kwargs: Any) -> None:
            raise Asked(Prompt(tuple(text), tuple(images), first.size if first else None))

        with ExitStack() as stack:
            for module in self.transformers().values():
                stack.callback(module.register_forward_pre_hook(stop, with_kwargs=True).remove)
            stack.enter_context(replaced(self.pipe, "encode_prompt", functools.partial(noting, text)))
            for owner, name in self._image_makers():
                stack.enter_context(replaced(owner, name, functools.partial(noting, images)))
            return self._call(stack, captions, source, size, {"output_type": "latent"} | self.guided(guidance))

    def example(self, size: Size, batch: int = 1) -> Prompt:
        """A prompt whose shapes are right, made without weights: zeros where a weight would have counted.

        Raises:
            UserError: the pipeline cannot encode.
        """
        if (size, batch) not in self._examples:
            with WithoutWeights():
                prompt = self.without_weights(size, batch)
            self._examples[size, batch] = with_zeros(prompt)
        return self._examples[size, batch]

    def take_example(self, size: Size, prompt: Prompt, batch: int = 1) -> None:
        """Have a prompt of as many samples stand for others of this size, see `example`."""
        self._examples[size, batch] = prompt

    def shapes(self, captions: str | list[str], size: Size, guidance: float = 1.0) -> Prompt:
        """What `encode` would give, made without weights: likewise.

        Raises:
            UserError: the pipeline cannot encode these without a source image.
        """
        with WithoutWeights():
            return with_zeros(self.encode(captions, size, guidance=guidance))

    def without_weights(self, size: Size, batch: int) -> Prompt:
        """A prompt from words alone, if the pipeline draws from those, else with a source image."""
        fault = None
        blank = Image.new("RGB", size.source or (size.width, size.height))
        needed = size.source or self.edits
        sources = [None, blank] if self.source_argument and not needed else [blank if needed else None]
        for source in sources:
            for caption in _CAPTIONS:
                try:
                    prompt = self.encode([caption] * batch if batch > 1 else caption, size, source)
                except UserError as why:
                    fault = fault or why
                else:
                    if all(tensor.numel() for tensor in prompt.tensors()):
                        return prompt
        raise fault or UserError(f"{self.folder}: {type(self.pipe).__name__} makes nothing of a caption")

    @property
    def _needs_a_source(self) -> bool:
        """Whether it is known that the pipeline does not draw from words alone."""
        given = [self.parameters[name] for name in SOURCES if name in self.parameters]
        return any(parameter.default is inspect.Parameter.empty for parameter in given)

    @property
    def draws_clips(self) -> bool:
        """Whether the pipeline is told how many frames to draw."""
        return any(name in self.parameters for name in FRAMES)

    @property
    def source_argument(self) -> str:
        """The argument that takes a source image; empty: there is none."""
        return next((name for name in SOURCES if name in self.parameters), "")

    def run(
        self,
        stack: ExitStack,
        size: Size,
        prompt: Prompt,
        latents: Tensor | None = None,
        rung: int | None = None,
        *,
        whole: bool = False,
        options: Mapping[str, Any] | None = None,
        output_type: str = "latent",
        ends: bool = True,
    ) -> Any:
        """Run the pipeline on what was stored until something that was replaced ends it; returns what that found.

        Args:
            stack: closed afterwards.
            latents: (B, ...) that `prepare_latents` gives; several kinds of them lie flat, (B, N); None: its own.
            rung: that `set_timesteps` keeps; None: with latents none, without them all.
            whole: keep all rungs whatever else is given.
            options: of this call.
            ends: whether something will end it; else it draws to its end.
        """
        text, images = iter(prompt.text), iter(prompt.images)
        stack.enter_context(replaced(self.pipe, "encode_prompt", functools.partial(answering, text)))
        for owner, name in self._image_makers():
            stack.enter_context(replaced(owner, name, functools.partial(answering, images)))
        if latents is not None:
            left, layout = [latents], self.entering.get(size)
            ours = functools.partial(next_of, left) if self.own.noised else instead_of_its_own(latents, layout)
            for name in ("prepare_latents", *self.own.noised):
                if hasattr(self.pipe, name):
                    stack.enter_context(replaced(self.pipe, name, ours))
            if not whole:
                stack.enter_context(replaced(self.pipe.scheduler, "set_timesteps", functools.partial(self._rung, rung)))
        given = {} if hasattr(self.pipe, "prepare_latents") else {"latents": latents}
        image = Image.new("RGB", prompt.source) if prompt.source else None
        captions = _ANY if latents is None or len(latents) == 1 else [_ANY] * len(latents)
        return self._call(
            stack, captions, image, size, given | {"output_type": output_type} | dict(options or {}), ends
        )

    def _call(
        self,
        stack: ExitStack,
        caption: str | list[str],
        source: Image.Image | list[Image.Image] | None,
        size: Size,
        given: dict[str, Any],
        ends: bool = True,
    ) -> Any:
        """The pipeline's `__call__`; returns what `Asked`, which ends it, found, or what it returned at its end."""
        stack.enter_context(torch.no_grad())
        stack.enter_context(SaysCpu())
        sides = {"height": size.height, "width": size.width, **dict.fromkeys(FRAMES, size.frames)}
        standard: dict[str, Any] = {"prompt": caption, "num_inference_steps": self.rungs, "output_type": "latent"}
        standard |= sides
        standard["generator"] = torch.Generator().manual_seed(0)  # some draw from what their VAE says of a source
        if source is not None:
            if not self.source_argument:
                raise UserError(f"{self.folder}: {type(self.pipe).__name__} takes no source image")
            standard[self.source_argument] = source
        called = {key: value for key, value in (standard | self.options | given).items() if key in self.parameters}
        name = type(self.pipe).__name__
        try:
            drawn = self.pipe(**called)
        except Asked as asked:
            return asked.found
        except StopIteration:
            raise UserError(f"{self.folder}: {name} encodes more than was stored") from None
        except UserError:
            raise
        except Exception as fault:  # whatever a pipeline says to what it is given
            if isinstance(fault, RuntimeError) and memory.is_out_of_memory(fault):
                raise
            raise UserError(f"{self.folder}: {name} cannot be asked ({brief(fault)})") from fault
        finally:
            stack.close()
        if ends:
            raise UserError(f"{self.folder}: {name} ended without calling its {self.component}")
        return drawn

    def _image_makers(self) -> list[tuple[Any, str]]:
        """Methods that make something of a source image: (owner, name)."""
        makers = [(getattr(self.pipe, "vae", None), "encode"), (self.pipe, "encode_image")]
        return [(owner, name) for owner, name in makers if callable(getattr(owner, name, None))]

    def _rung(self, rung: int | None, old: Callable[..., Any]) -> Callable[..., Any]:
        """`set_timesteps` that keeps one rung, or none."""
        scheduler = self.pipe.scheduler

        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            old(*args, **kwargs)
            first, stop = (0, 0) if rung is None else (rung, rung + 1)
            sigmas = getattr(scheduler, "sigmas", None)
            if isinstance(sigmas, Tensor) and len(sigmas) == len(scheduler.timesteps) + 1:
                scheduler.sigmas = sigmas[first : stop + 1]
            scheduler.timesteps = scheduler.timesteps[first:stop]
            if hasattr(scheduler, "num_inference_steps"):
                scheduler.num_inference_steps = stop - first

        return set_timesteps
