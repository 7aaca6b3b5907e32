"""Encoded captions of any family: trees of tensors as `encode_prompt` returned them, stored, read and joined.

A tree is made of tuples, lists and dicts; its leaves are tensors, numbers, words and None.
Shapes: B captions, S tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any
Path = tuple[Any, ...]
"""Where in a tree a leaf is: keys and places from the root."""


def leaves(tree: Tree, path: Path = (), whole: Collection[Path] = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of a tree and where it is; what stands at the paths `whole` is taken for a leaf, too."""
    if path in whole:
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, key), whole)
    elif isinstance(tree, (list, tuple)):
        for place, value in enumerate(tree):
            yield from leaves(value, (*path, place), whole)
    else:
        yield path, tree


def mapped(tree: Tree, function: Any, path: Path = (), whole: Collection[Path] = ()) -> Tree:
    """The same tree with `function(path, leaf)` in the place of each of its `leaves`."""
    if path in whole:
        return function(path, tree)
    if isinstance(tree, Mapping):
        return {key: mapped(value, function, (*path, key), whole) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([mapped(value, function, (*path, place), whole) for place, value in enumerate(tree)])
    return function(path, tree)


def equal(own: Tree, other: Tree) -> bool:
    """Whether two trees are the same, tensors to the bit."""
    mine, tree = pytree.tree_flatten(own)
    theirs, others = pytree.tree_flatten(other)
    return str(tree) == str(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype else _same(a, b)
        for a, b in zip(mine, theirs, strict=True)
    )


def _same(own: Any, other: Any) -> bool:
    """Of what is no pair of tensors of one dtype."""
    return own is other or (type(own) is type(other) and not isinstance(own, Tensor) and own == other)


def to_stored(tree: Tree, name: str) -> tuple[dict[str, Tensor], str]:
    """A tree as tensors for a safetensors file, and a JSON word that says how they were put together.

    Floats become bfloat16. Zeros at the end of a tensor's dimension 1 (padding that families read as zeros) are left
    out and put back by `from_stored`.

    Args:
        name: beginning of the tensors' names.
    """
    tensors: dict[str, Tensor] = {}

    def described(value: Tree) -> Any:
        if isinstance(value, Tensor):
            key, whole = f"{name}.{len(tensors)}", value.shape
            value = value.detach().cpu()
            if value.is_floating_point():
                value = value.bfloat16()
                if value.dim() > 2:
                    holds = value.transpose(0, 1).flatten(1).any(1).nonzero()
                    value = value[:, : int(holds.max()) + 1 if len(holds) else 1]
            # A copy: encoders return one tensor in two places, which a safetensors file cannot hold.
            tensors[key] = value.clone(memory_format=torch.contiguous_format)
            return {"tensor": key, "length": whole[1] if len(whole) > 1 else 0}
        if isinstance(value, Mapping):
            return {"dict": {key: described(each) for key, each in value.items()}}
        if isinstance(value, (list, tuple)):
            return {"tuple" if isinstance(value, tuple) else "list": [described(each) for each in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise ValueError(f"a {type(value).__name__} in what encode_prompt returned cannot be stored")

    return tensors, json.dumps(described(tree))


def from_stored(tensors: Mapping[str, Tensor], word: str) -> Tree:
    """The tree again; floats are float32.

    Raises:
        ValueError: a tensor is missing, or the word says nothing.
    """

    def made(value: Any) -> Tree:
        [(kind, inside)] = [pair for pair in value.items() if pair[0] != "length"]
        if kind == "tensor":
            tensor = tensors[inside]
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            if (missing := value["length"] - tensor.shape[1] if tensor.dim() > 1 else 0) > 0:
                tensor = torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], 1)
            return tensor
        if kind == "dict":
            return {key: made(each) for key, each in inside.items()}
        if kind in ("tuple", "list"):
            return (tuple if kind == "tuple" else list)(made(each) for each in inside)
        if kind == "value":
            return inside
        raise ValueError(f"'{kind}' is nothing that is stored")

    try:
        return made(json.loads(word))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as fault:  # the last: torch's, of sizes
        raise ValueError(f"its text cannot be put together ({fault})") from None


@dataclass(frozen=True)
class Joining:
    """How captions, each encoded by itself, become one batch.

    Attributes:
        batch: leaf -> its dimension of captions; a leaf that is not there is the same for all.
        length: leaf -> its dimension of tokens, where captions differ in it.
        padded: whether a shorter caption with zeros behind it is what joint encoding gives.
        lists: where lists with an entry a caption stand; joined, they are one after the other.
        masks: leaf that is None as long as no caption has padding, and else says which tokens are none -> the leaf
            of those tokens, and the mask's dtype.
    """

    batch: Mapping[Path, int]
    length: Mapping[Path, int]
    padded: bool
    lists: frozenset[Path] = frozenset()
    masks: Mapping[Path, tuple[Path, torch.dtype]] = field(default_factory=dict)

    @classmethod
    def learn(cls, short: Tree, long: Tree, both: Tree) -> Joining:
        """From two captions of unlike length encoded each by itself, and together.

        Raises:
            ValueError: they are put together in a way that is not known.
        """
        lists = frozenset(_lists_of_captions(short, long, both))
        own, other, joint = (dict(leaves(tree, whole=lists)) for tree in (short, long, both))
        if not own.keys() == other.keys() == joint.keys():
            raise ValueError("two captions together make another number of tensors than each by itself")
        batch, length = {}, {}
        for path, tensor in joint.items():
            if not isinstance(tensor, Tensor) or (own[path] is None and other[path] is None):
                continue
            batch_dim, length_dim = _dimensions(own[path], other[path], tensor)
            if batch_dim is not None:
                batch[path] = batch_dim
            if length_dim is not None:
                length[path] = length_dim
        masks = {}
        for path, mask in joint.items():
            if isinstance(mask, Tensor) and path not in batch and own[path] is None and other[path] is None:
                masks[path] = _masked(mask, own, other, length), mask.dtype
        joining = cls(batch, length, True, lists, masks)
        found = dict(leaves(joining([short, long])))
        same = all(_counts_the_same(found.get(path), leaf) for path, leaf in leaves(both))
        return replace(joining, padded=same)

    def __call__(self, texts: Sequence[Tree]) -> Tree:
        """Join captions of B = 1 into one batch, zeros behind the shorter ones."""
        values = [dict(leaves(text, whole=self.lists)) for text in texts]

        def joined(path: Path, leaf: Any) -> Any:
            if path in self.lists:
                return [entry for value in values for entry in value[path]]
            if path in self.masks:
                masks = (self._mask(path, value, values) if value[path] is None else value[path] for value in values)
                rows = [row for row in masks if row is not None]
                return torch.cat(rows) if rows else None
            if path not in self.batch:
                return leaf
            tensors = [value[path] for value in values]
            if path in self.length:
                dim = self.length[path]
                most = max(tensor.shape[dim] for tensor in tensors)
                tensors = [_grown(tensor, dim, most) for tensor in tensors]
            return torch.cat(tensors, self.batch[path])

        return mapped(max(texts, key=self._tokens), joined, whole=self.lists)

    def lengthened(self, texts: Sequence[Tree]) -> list[Tree]:
        """The same captions, each with zeros behind it up to the longest."""
        values = [dict(leaves(text, whole=self.lists)) for text in texts]
        most = {path: max(value[path].shape[dim] for value in values) for path, dim in self.length.items()}

        def longer(value: Mapping[Path, Any], path: Path, leaf: Any) -> Any:
            if path in self.masks:
                return self._mask(path, value, values)
            return _grown(leaf, self.length[path], most[path]) if path in most else leaf

        return [
            mapped(text, partial(longer, value), whole=self.lists) for text, value in zip(texts, values, strict=True)
        ]

    def _mask(self, path: Path, value: Mapping[Path, Any], values: Sequence[Mapping[Path, Any]]) -> Tensor | None:
        """Which tokens of one caption (1, S) are its own beside longer ones; None where all are as long."""
        tokens, dtype = self.masks[path]
        count, *counts = (each[tokens].shape[self.length[tokens]] for each in (value, *values))
        return (torch.arange(max(counts)) < count).to(dtype)[None] if len(set(counts)) > 1 else None

    def _tokens(self, text: Tree) -> int:
        values = dict(leaves(text))
        return sum(values[path].shape[dim] for path, dim in self.length.items())


def _lists_of_captions(short: Tree, long: Tree, both: Tree, path: Path = ()) -> Iterator[Path]:
    """Where one caption gives a list of one and two give a list of two."""
    trees = (short, long, both)
    if all(isinstance(tree, list) for tree in trees) and tuple(map(len, trees)) == (1, 1, 2):
        yield path
    elif all(isinstance(tree, Mapping) for tree in trees):
        for key in short.keys() & long.keys() & both.keys():
            yield from _lists_of_captions(short[key], long[key], both[key], (*path, key))
    elif all(isinstance(tree, (list, tuple)) for tree in trees):
        for place, each in enumerate(zip(*trees, strict=False)):
            yield from _lists_of_captions(*each, (*path, place))


def _masked(mask: Tensor, own: Mapping[Path, Any], other: Mapping[Path, Any], length: Mapping[Path, int]) -> Path:
    """The leaf whose tokens a mask (2, S) tells from padding.

    Raises:
        ValueError: there is none.
    """
    for path, dim in length.items():
        counts = torch.tensor([[each[path].shape[dim]] for each in (own, other)])
        if mask.shape == (2, int(counts.max())) and torch.equal(mask > 0, torch.arange(mask.shape[1]) < counts):
            return path
    raise ValueError(f"None and None become a tensor of {tuple(mask.shape)}, which is no mask of tokens")


def _dimensions(own: Any, other: Any, joint: Tensor) -> tuple[int | None, int | None]:
    """The dimension of captions, and that of tokens, of a tensor that two captions gave, and both together.

    Raises:
        ValueError: they were not put together along one dimension, nor is it the same for all.
    """
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else None for each in (own, other, joint)]
    if None in shapes or len({each.dim() for each in (own, other, joint)}) > 1:
        raise ValueError(f"tensors {shapes[0]} and {shapes[1]} become one of {shapes[2]}")
    unlike = [d for d in range(joint.dim()) if own.shape[d] != other.shape[d]]
    batch = [d for d, size in enumerate(joint.shape) if d not in unlike and own.shape[d] == 1 and size == 2]
    if len(unlike) > 1 or (not batch and joint.shape not in (own.shape, other.shape)):
        raise ValueError(f"tensors {shapes[0]} and {shapes[1]} become one of {shapes[2]}")
    return next(iter(batch), None), next(iter(unlike), None)


def _grown(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind a tensor's dimension."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _counts_the_same(own: Any, joint: Any) -> bool:
    if not (isinstance(own, Tensor) and isinstance(joint, Tensor)):
        return type(own) is type(joint) and own == joint
    return own.shape == joint.shape and torch.allclose(own.double(), joint.double(), rtol=1e-3, atol=1e-4)
