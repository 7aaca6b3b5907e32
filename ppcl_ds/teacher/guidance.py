"""Guidance as the stock pipeline guides: its own loop is given what the transformer said with and without the prompt.

Shapes: latents are as the scheduler steps them, B samples: (B, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.flows import arguments_of
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.replacing import replaced, stepped_by

_SCALE = 2.0
"""At which it is learned which answer is which."""


class NotGuidedError(UserError):
    """The pipeline does not read the empty prompt at this rung."""


class Guide:
    """One step of guided sampling, of samples that are at one rung.

    Args:
        call: the pipeline.

    Raises:
        UserError: it has no guidance, or one of another kind.
    """

    def __init__(self, call: PipelineCall) -> None:
        self.call = call
        self._first: dict[Size, bool] = {}
        """Whether the first answer is the one with the prompt."""

    def __call__(
        self, prompted: Tensor, unprompted: Tensor, latents: Tensor, rung: int, prompt: Prompt, size: Size, scale: float
    ) -> Tensor:
        """What the scheduler steps by, (B, ...).

        Args:
            prompted, unprompted: what the transformer put out, (B, ...).
            latents: that it read.
            prompt: of all B captions, as it is read with guidance.

        Raises:
            NotGuidedError: so it steps by `prompted`.
        """
        answers = [prompted, unprompted]
        if not self._prompt_first(prompted, latents, rung, prompt, size):
            answers.reverse()
        return self._stepped(answers, latents, rung, prompt, size, scale)

    def _prompt_first(self, like: Tensor, latents: Tensor, rung: int, prompt: Prompt, size: Size) -> bool:
        """Guidance adds what the prompt says, and takes away what is said without."""
        if size not in self._first:
            one, zero = torch.ones_like(like), torch.zeros_like(like)
            sums = [
                float(self._stepped(answers, latents, rung, prompt, size, _SCALE).mean())
                for answers in ([one, zero], [zero, one])
            ]
            if max(sums) <= 0 or min(sums) > 0:
                raise UserError(
                    f"{self.call.folder}: {type(self.call.pipe).__name__} guides in a way that is not known; set "
                    "evaluate.guidance: 1, and trajectories.guidance: [1, 1]"
                )
            self._first[size] = sums[0] > sums[1]
        return self._first[size]

    def _stepped(
        self, answers: list[Tensor], latents: Tensor, rung: int, prompt: Prompt, size: Size, scale: float
    ) -> Tensor:
        left = list(answers)

        def answer(old: Callable[..., Any]) -> Callable[..., Any]:
            module = old.__self__  # type: ignore[attr-defined]

            def forward(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
                read = next(iter(arguments_of(module, args, kwargs).values()))
                branches = max(1, len(read) // len(latents))
                asked = [left.pop(0) for _ in range(min(branches, len(left)))]
                return self.call.as_output(torch.cat(asked), return_dict, size)

            return forward

        with ExitStack() as stack:
            stack.enter_context(replaced(self.call.pipe.scheduler, "step", stepped_by(self.call.own.kinds)))
            stack.enter_context(replaced(self.call.transformer, "forward", answer))
            options = self.call.guided(scale)
            found = self.call.run(stack, size, prompt, latents, rung, options=options)
        if left:
            raise NotGuidedError(
                f"{self.call.folder}: {type(self.call.pipe).__name__} does not read the empty prompt at rung {rung}; "
                "set trajectories.guidance: [1, 1]"
            )
        return found
