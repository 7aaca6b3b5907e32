"""Units' blocks and their loss under torch.compile, which fuses what is done element by element."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds import launcher
from ppcl_ds.errors import shown

BACKEND = "inductor"
"""Of torch.compile."""

_refused: set[object] = set()
"""Code that does not compile, whichever module it is the forward of."""


class Compiled:
    """A function that is compiled when it is first called; where that fails it runs as it is, and one line says so.

    Sizes are dynamic: another number of tokens needs no compiling. Functions of the same code, such as the forwards of
    a library's blocks, are compiled once.

    Args:
        what: the function in words.
        parameters: what it is differentiated by, beside those of its arguments that are.
    """

    def __init__(self, function: Callable[..., Any], what: str, parameters: Iterable[Tensor] = ()) -> None:
        functools.update_wrapper(self, function)  # its arguments' names are asked for
        self.function, self.what, self.parameters = function, what, list(parameters)
        self.call: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.call is None:
            self.call = self._chosen(args, kwargs)
        return self.call(*args, **kwargs)

    def _chosen(self, args: Any, kwargs: dict[str, Any]) -> Callable[..., Any]:
        """The compiled function, if it can be called and differentiated: the backward pass is compiled later."""
        code = getattr(self.function, "__code__", self.function)
        if code in _refused:
            return self.function
        compiled = torch.compile(self.function, dynamic=True, backend=BACKEND)
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        by = [leaf for leaf in (*self.parameters, *leaves) if leaf.requires_grad]
        try:
            found = [leaf for leaf in pytree.tree_leaves(compiled(*args, **kwargs)) if isinstance(leaf, Tensor)]
            if outputs := [leaf.sum() for leaf in found if leaf.requires_grad]:
                torch.autograd.grad(outputs, by, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as fault:  # whatever a compiler says to a model of somebody else
            _refused.add(code)
            why = shown(" ".join(str(fault).splitlines()[:2]))  # what follows is for who debugs the compiler
            launcher.say_once(f"note: {self.what} does not compile, and runs as it is ({why})")
            return self.function
        return compiled
