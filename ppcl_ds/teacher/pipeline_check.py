"""Whether asking a pipeline gives what it gives its transformer while it draws."""

from __future__ import annotations

from ppcl_ds.data.batch import Prompt, Size
from ppcl_ds.data.text import equal
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.pipeline_call import PipelineCall
from ppcl_ds.teacher.pipeline_look import DRAWN


def check(call: PipelineCall, prompt: Prompt, size: Size) -> None:
    """Have the stock pipeline draw a few steps with a transformer that answers noise, and ask it the same.

    Raises:
        UserError: what it gives its transformer while it draws is something else; its loop changes latents in a way
            that is not known.
    """
    seen = call.drawn(prompt, size)
    if seen.stepped[0].shape not in seen.prepared:
        call.latents_shape(size)  # which learns how they are laid out
    with call.stepping(DRAWN):
        for rung in range(1, DRAWN):
            module, arguments = call.asked(seen.stepped[rung], rung, prompt, size)
            stock, expected = seen.called[rung]
            if module is not stock or not equal(arguments, expected):
                raise UserError(
                    f"{call.folder}: what {type(call.pipe).__name__} gives its transformer cannot be asked for: it is "
                    "something else while it draws"
                )
