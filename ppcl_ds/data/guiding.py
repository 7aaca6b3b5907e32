"""What a pipeline reads with guidance, put together from a caption and the empty one, each encoded without.

So prompts that lie encoded on disk can be drawn with guidance, and no text encoder has to be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from ppcl_ds.data.text import Path, Tree, leaves, mapped


@dataclass(frozen=True)
class _From:
    """What stands in the caption's text (or in the empty one's) at a path."""

    empty: bool
    path: Path


@dataclass(frozen=True)
class Guiding:
    """Where each leaf of a guided text stands in the caption's text or in the empty one's.

    Attributes:
        tree: the guided text, with `_From` in the place of its tensors, of lists with a tensor a caption, and of masks
            that one caption does not need.
    """

    tree: Tree

    @classmethod
    def learn(cls, caption: Tree, empty: Tree, guided: Tree) -> Guiding:
        """From a caption and the empty one, each encoded by itself, and the caption encoded with guidance.

        Raises:
            ValueError: a tensor of the guided text is in neither.
        """
        known = [(_From(False, path), leaf) for path, leaf in leaves(caption, whole=_lists(caption))]
        known += [(_From(True, path), leaf) for path, leaf in leaves(empty, whole=_lists(empty))]
        nothing = {place for place, leaf in known if leaf is None}

        def found(path: Path, leaf: Any) -> Any:
            if not isinstance(leaf, (Tensor, list)):
                return leaf
            for place, other in known:
                if type(other) is type(leaf) and _alike(other, leaf):
                    return place
            if isinstance(leaf, list):
                return [found(path, entry) for entry in leaf]
            raise ValueError(f"with guidance it also reads a tensor of {tuple(leaf.shape)}")

        tree = mapped(guided, found, whole=_lists(guided))
        placed = dict(leaves(tree))

        def beside(path: Path, leaf: Any) -> Any:
            """Of None, what stands beside the same tensors in the caption's text: of several captions, a mask."""
            for other, place in placed.items() if leaf is None else ():
                if isinstance(place, _From) and other[:-1] == path[:-1] and other[-1] == place.path[-1]:
                    same = _From(place.empty, (*place.path[:-1], path[-1]))
                    if same in nothing:
                        return same
            return leaf

        return cls(mapped(tree, beside))

    def __call__(self, caption: Tree, empty: Tree) -> Tree:
        """The guided text of other captions, one or several joined."""

        def taken(_: Path, leaf: Any) -> Any:
            return reduce(getitem, leaf.path, empty if leaf.empty else caption) if isinstance(leaf, _From) else leaf

        return mapped(self.tree, taken)


def _lists(tree: Tree) -> set[Path]:
    """Where lists of one tensor stand: of several captions they have an entry each."""
    ends = {path[:-1] for path, leaf in leaves(tree) if isinstance(leaf, Tensor)}
    nodes = {path: reduce(getitem, path, tree) for path in ends}
    return {path for path, node in nodes.items() if isinstance(node, list) and len(node) == 1}


def _alike(own: Any, other: Any) -> bool:
    if isinstance(own, list):
        own, other = own[0], other[0]
    return own.shape == other.shape and own.dtype == other.dtype and torch.allclose(own, other, rtol=1e-2)
