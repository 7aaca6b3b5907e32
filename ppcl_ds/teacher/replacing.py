"""Methods of a stock pipeline replaced for one call: noted, answered from what was noted, or cut short."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.utils import _pytree as pytree

from ppcl_ds.data.batch import Prompt
from ppcl_ds.data.text import Tree
from ppcl_ds.teacher.rearrangement import Rearrangement


class Asked(BaseException):  # pipelines catch Exception
    """What was waited for has come: the pipeline's call ends here."""

    def __init__(self, found: Any) -> None:
        self.found = found


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """Replace a method of an object; its signature stays, as pipelines look at that of `set_timesteps`."""
    old = getattr(owner, name)
    new: Any = functools.wraps(old)(make(old))
    new.__signature__ = inspect.signature(old)
    setattr(owner, name, new)
    try:
        yield
    finally:
        delattr(owner, name)


def ending(found: Callable[..., Any]) -> Callable[[Any], Callable[..., Any]]:
    """A method that ends the pipeline's call with what `found(old method, *args, **kwargs)` gives."""

    def make(old: Any) -> Callable[..., Any]:
        def end(*args: Any, **kwargs: Any) -> None:
            raise Asked(found(old, *args, **kwargs))

        return end

    return make


def the_first(old: Callable[..., Any], first: Any, *args: Any, **kwargs: Any) -> Any:
    """What a method was called with first; for `ending`."""
    return first


def stepped_by(kinds: int) -> Callable[[Any], Callable[..., Any]]:
    """A scheduler's `step` that ends the pipeline's call with what all kinds of latents are stepped by, joined."""
    found: list[Tensor] = []

    def make(old: Any) -> Callable[..., Any]:
        def step(output: Tensor, time: Any, sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            found.append(output)
            if len(found) == kinds:
                raise Asked(joined(found))
            return (sample,)

        return step

    return make


def answering(stored: Iterator[Tree], old: Callable[..., Any]) -> Callable[..., Any]:
    """A method that gives what it gave when it was noted."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        return _as_returned(next(stored))

    return answer


def noting(found: list[Tree], old: Callable[..., Any]) -> Callable[..., Any]:
    """A method that also notes what it gives; what it calls itself is not noted."""

    def note(*args: Any, **kwargs: Any) -> Any:
        before = len(found)
        returned = old(*args, **kwargs)
        del found[before:]
        found.append(as_tree(returned))
        return returned

    return note


def as_tree(returned: Any) -> Tree:
    """What an encoder returned, without its class."""
    if hasattr(returned, "latent_dist"):
        return {"latent_dist": returned.latent_dist.parameters}
    for name in ("latents", "latent"):
        if isinstance(getattr(returned, name, None), Tensor):
            return {name: getattr(returned, name)}
    return returned


def _as_returned(tree: Tree) -> Any:
    if isinstance(tree, dict) and "latent_dist" in tree:
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(tree["latent_dist"]))
    if isinstance(tree, dict) and tree.keys() <= {"latents", "latent"}:
        return SimpleNamespace(**tree)
    return copy.copy(tree)


def instead_of_its_own(latents: Tensor, layout: Rearrangement | None) -> Callable[[Any], Callable[..., Any]]:
    """`prepare_latents` that gives ours in the place of its own; what else it makes stays (ids, condition channels).

    Args:
        layout: from what it gives to ours; None: they lie alike.
    """

    def make(old: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            made = old(*args, **kwargs)
            several = made if isinstance(made, (tuple, list)) else (made,)
            tensors = [place for place, each in enumerate(several) if isinstance(each, Tensor)]
            alike = (place for place in tensors if several[place].shape == latents.shape)
            at = next(alike, None) if layout is None else tensors[0]
            if at is None:
                raise ValueError(f"prepare_latents gives no latents of {tuple(latents.shape)}")
            own = latents.to(several[at]) if layout is None else layout.put_into(several[at], latents)
            return own if several is not made else (*several[:at], own, *several[at + 1 :])

        return prepare_latents

    return make


def next_of(left: list[Tensor], old: Callable[..., Any]) -> Callable[..., Any]:
    """The same of several that lie flat, one behind the other: it gives, of `left`, as many as its own are.

    Args:
        left: (B, N), in a list that all of them share.
    """

    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        made = old(*args, **kwargs)
        like = made if isinstance(made, Tensor) else made[0]
        own, left[0] = left[0].tensor_split([like.shape[1:].numel()], 1)
        return instead_of_its_own(own.reshape(like.shape), None)(lambda: made)()

    return prepare_latents


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """A tensor as it is, (B, ...); several lie flat, one behind the other, (B, N)."""
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten(1) for tensor in tensors], 1)


def with_zeros(prompt: Prompt) -> Prompt:
    """A prompt whose tensors without values are zeros."""

    def zeros(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor

    text, images = pytree.tree_map_only(Tensor, zeros, (prompt.text, prompt.images))
    return Prompt(text, images, prompt.source)
