"""A stock pipeline looked at while it draws: which shapes there are, and in which order latents lie where.

Shapes: latents are as the scheduler steps them, B samples: (B, ...).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.flows import arguments_of
from ppcl_ds.teacher.pipeline_run import PipelineRun
from ppcl_ds.teacher.rearrangement import Rearrangement
from ppcl_ds.teacher.replacing import Asked, ending, joined, replaced
from ppcl_ds.teacher.weightless import WithoutWeights

Arguments = dict[str, Any]
"""Of the transformer's forward, by name."""

DRAWN = 3
"""Steps that a pipeline draws to be looked at."""


_KEPT = 128
"""Layouts that are remembered; where captions have one each, there are many."""


class Drawn(NamedTuple):
    """What was seen while a pipeline drew, step by step.

    Attributes:
        called: the transformer that was called first, with what.
        answered: what it answered.
        stepped: the latents that the scheduler stepped.
        prepared: shapes of what `prepare_latents` gave.
    """

    called: list[tuple[nn.Module, Arguments]]
    answered: list[Tensor]
    stepped: list[Tensor]
    prepared: list[torch.Size]


def _sample(old: Callable[..., Any], output: Any, time: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a scheduler's `step` was given to step."""
    return sample


class PipelineLook(PipelineRun):
    """A pipeline folder that is looked at without its weights; see `PipelineRun` for its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shapes: dict[Size, tuple[torch.Size, torch.Size]] = {}
        self._layouts: dict[tuple[Any, ...], Rearrangement] = {}
        self._listed = False
        """Whether the transformer puts out a list of samples."""
        self._parts: dict[Size, list[torch.Size]] = {}
        """Shapes of what it puts out for a sample, of every kind of latents."""
        self._outputs: dict[tuple[Size, nn.Module], Any] = {}
        """What each transformer puts out, without values."""

    def drawn(self, prompt: Prompt, size: Size) -> Drawn:
        """A few steps of the stock pipeline with a transformer that answers noise."""
        seen = Drawn([], [], [], [])
        generator = torch.Generator().manual_seed(0)

        def answers(old: Callable[..., Any]) -> Callable[..., Any]:
            module = old.__self__  # type: ignore[attr-defined]
            made: list[Any] = []

            def forward(*args: Any, **kwargs: Any) -> Any:
                given = arguments_of(module, args, kwargs)
                given = pytree.tree_map_only(Tensor, torch.clone, given)  # a loop may write into its own
                if not made:  # of one draw, all outputs are alike
                    with WithoutWeights():
                        made.append(old(*args, **kwargs))
                    self._outputs[size, module] = made[0]
                found = pytree.tree_map_only(Tensor, lambda t: torch.randn(t.shape, generator=generator), made[0])
                if len(seen.called) > len(seen.stepped):  # another one, for guidance
                    return found
                seen.called.append((module, given))
                parts = list(found if isinstance(found, tuple) else found.values())[: self.own.kinds]
                self._listed = isinstance(parts[0], list)
                parts = [torch.stack(part) if isinstance(part, list) else part for part in parts]
                self._parts[size] = [part.shape[1:] for part in parts]
                seen.answered.append(joined(parts))
                return found

            return forward

        def prepares(old: Callable[..., Any]) -> Callable[..., Any]:
            def prepare_latents(*args: Any, **kwargs: Any) -> Any:
                made = old(*args, **kwargs)
                seen.prepared[:] = [each.shape for each in pytree.tree_leaves(made) if isinstance(each, Tensor)]
                return made

            return prepare_latents

        def end(latents: Tensor) -> None:  # before anything is decoded
            if len(seen.stepped) == DRAWN:
                raise Asked(seen)

        with ExitStack() as stack:
            stack.enter_context(self.stepping(DRAWN))
            stack.enter_context(self._watching(lambda latents: seen.stepped.append(latents.clone()), end))
            if hasattr(self.pipe, "prepare_latents"):
                stack.enter_context(replaced(self.pipe, "prepare_latents", prepares))
            for module in self.transformers().values():
                stack.enter_context(replaced(module, "forward", answers))
            self.run(stack, size, prompt, ends=False)
        return seen

    @contextmanager
    def _watching(
        self, before: Callable[[Tensor], None] | None = None, after: Callable[[Tensor], None] | None = None
    ) -> Iterator[None]:
        """Look at the latents that the scheduler steps, all kinds of them together.

        Of the class, not of the object: some pipelines copy their scheduler.
        """
        scheduler = type(self.pipe.scheduler)
        step = scheduler.step
        entered: list[Tensor] = []
        left: list[Tensor] = []

        def look(kinds: list[Tensor], tensor: Tensor, at: Callable[[Tensor], None] | None) -> None:
            if at is None:
                return
            kinds.append(tensor)
            if len(kinds) == self.own.kinds:
                at(joined(kinds))
                kinds.clear()

        @functools.wraps(step)
        def watched(scheduler: Any, output: Any, time: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            look(entered, sample, before)
            found = step(scheduler, output, time, sample, *args, **kwargs)
            look(left, found[0], after)
            return found

        scheduler.step = watched
        try:
            yield
        finally:
            scheduler.step = step

    def latents_shape(self, size: Size) -> torch.Size:
        """Of one sample as the scheduler steps it, (1, ...)."""
        return self._shapes_of(size)[0]

    def output_shape(self, size: Size) -> torch.Size:
        """Of what the transformer puts out for one sample, (1, ...)."""
        return self._shapes_of(size)[1]

    def _shapes_of(self, size: Size) -> tuple[torch.Size, torch.Size]:
        """Of latents and of the transformer's output."""
        if size not in self._shapes:
            self.look(size)
        return self._shapes[size]

    def look(self, size: Size) -> None:
        """Have the pipeline draw, its transformer run once without weights, for what shapes there are."""
        seen = self.drawn(self.example(size).to(self.dtype), size)
        shape = seen.stepped[0].shape
        self._shapes[size] = shape, seen.answered[0].shape
        if seen.prepared and shape not in seen.prepared and not self.own.noised:
            self.entering[size] = self._enters(size, seen.prepared[0])

    def _enters(self, size: Size, shape: Sequence[int]) -> Rearrangement:
        """From what `prepare_latents` gives to what the scheduler steps."""

        def stepped(latents: Tensor) -> Tensor:
            with ExitStack() as stack:
                stack.enter_context(replaced(self.pipe.scheduler, "step", ending(_sample)))
                self._answer(stack, torch.zeros(self.output_shape(size)), size)
                return self.run(stack, size, self.example(size), latents, 0)

        return self._learned(("`prepare_latents` gives", size), stepped, shape, whole=False)

    def _answer(self, stack: ExitStack, output: Tensor, size: Size) -> None:
        """Have the transformer put out something, and others, of other shapes, zeros."""

        def answers(old: Callable[..., Any]) -> Callable[..., Any]:
            module = old.__self__  # type: ignore[attr-defined]
            known = None if module is self.transformer else self._outputs.get((size, module))

            def forward(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
                if known is None:
                    return self.as_output(output, return_dict, size)
                return pytree.tree_map_only(Tensor, lambda tensor: torch.zeros(tensor.shape), known)

            return forward

        for module in self.transformers().values():
            stack.enter_context(replaced(module, "forward", answers))

    def as_output(self, output: Tensor, return_dict: bool, size: Size) -> Any:
        """(B, ...) as the transformer would return it; some return a list of samples, some several kinds."""
        first, others = output, []
        if self.own.noised:
            shapes = self._parts[size]
            flat = output.split([shape.numel() for shape in shapes], 1)
            first, *others = (part.reshape(-1, *shape) for part, shape in zip(flat, shapes, strict=True))
        listed = list(first.unbind()) if self._listed else first
        return SimpleNamespace(sample=listed) if return_dict else (listed, *others)

    def _learned(
        self,
        key: tuple[Any, ...],
        function: Callable[[Tensor], Tensor],
        shape: Sequence[int],
        whole: bool,
        constants: bool = False,
    ) -> Rearrangement:
        """What a function does to (1, ...) of a shape; see `Rearrangement.learn`."""
        if key not in self._layouts:
            try:
                self._layouts[key] = Rearrangement.learn(function, shape[1:], whole, constants)
            except ValueError as fault:
                what = f"what {type(self.pipe).__name__} makes of what {key[0]}"
                raise UserError(f"{self.folder}: {what} cannot be learned ({fault})") from None
            if len(self._layouts) > _KEPT:
                self._layouts.pop(next(iter(self._layouts)))
        return self._layouts[key]
