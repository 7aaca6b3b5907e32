"""A model run without its weights: which tensors flow where, and whether two models compute the same.

Parameters are on the meta device, inputs and RoPE tables are real. What is computed from inputs alone (masks, lengths,
positions) keeps its values, so that models that branch on them run; whatever a parameter touches has a shape only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
_VALUES = tuple(
    getattr(torch.Tensor, name) for name in ("tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__")
)


class SaysCpu(TorchFunctionMode):
    """Meta tensors say that they are on the CPU, where everything is allowed, and that their values are zeros."""

    said = True

    @classmethod
    @contextmanager
    def silent(cls) -> Iterator[None]:
        """Inside, they say what they are: a model of somebody else's runs."""
        before, cls.said = cls.said, False
        try:
            yield
        finally:
            cls.said = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.said:
            return func(*args, **(kwargs or {}))
        if func == torch.Tensor.device.__get__ and args[0].is_meta:
            return torch.device("cpu")
        if func in _VALUES and args[0].is_meta:
            return func(torch.zeros(args[0].shape, dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))


class Remembering(TorchDispatchMode):
    """Inside, an operation on meta tensors like those of an earlier call is not asked again; see `_computed`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, dict(kwargs or {}))


class WithoutWeights(TorchDispatchMode):
    """Inside, an operation on a meta tensor and real ones gives a meta tensor, and nothing leaves the meta device.

    What depends on values that are not there (a choice of experts) is done as if they were zeros.
    """

    forgets = True
    """Whether it does not matter of what a tensor was made."""

    def __init__(self) -> None:
        super().__init__()
        self._says = ExitStack()

    def __enter__(self) -> Any:
        self._says.enter_context(SaysCpu())
        return super().__enter__()

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)
        self._says.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        return _computed(func, args, kwargs, self._asked) if self.forgets else self._asked(func, args, kwargs)

    def _asked(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in given):
            if func in _INDEXED:  # the shape of what a real mask chooses is known, that of a meta one is not
                args = (args[0], [i for index in args[1] for i in _places(index)], *args[2:])
            args, kwargs = pytree.tree_map_only(Tensor, _on_meta, (args, kwargs))
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("meta")
        try:
            return self.call(func, given, args, kwargs)
        except NotImplementedError:
            zeros = pytree.tree_map_only(Tensor, lambda tensor: torch.zeros_like(tensor, device="cpu"), (args, kwargs))
            return self.call(func, given, *zeros)

    def call(self, func: Any, given: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        """Do the operation.

        Args:
            given: its tensors, before they were moved to the meta device.
        """
        return _computed(func, args, kwargs)


_KNOWN: dict[Any, Any] = {}
"""Operation and what it was given -> what it gives, as `_described` has both."""


def _computed(func: Any, args: Any, kwargs: dict[str, Any], asked: Callable[..., Any] | None = None) -> Any:
    """What an operation gives; of meta tensors like those of an earlier call, without asking the operation.

    Most of the meta device's kernels are slow Python, and blocks of one class ask them the same again and again.

    Args:
        asked: does an operation that may need more than to be called; None: none does.
    """
    call = asked or (lambda func, args, kwargs: func(*args, **kwargs))
    try:
        described = _described(args), _described(tuple(kwargs.items()))
    except _HasValuesError:
        return call(func, args, kwargs)
    if not _is_pure(func):
        is_view = not (kwargs or func._schema.is_mutable)
        return func(*args) if is_view else call(func, args, kwargs)
    key = func, *described
    if key in _KNOWN:
        return _like(_KNOWN[key])
    output = call(func, args, kwargs)
    tensors = output if isinstance(output, (tuple, list)) else (output,)
    if all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors):
        _KNOWN[key] = _described(output)
    return output


class _HasValuesError(Exception):
    """A tensor is real."""


def _described(value: Any) -> Any:
    """The same for values that an operation cannot tell apart, but for what meta tensors' storages hold."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _HasValuesError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value))
    return type(value), value


def _like(described: Any) -> Any:
    """New meta tensors: one, or a tuple of them."""
    if isinstance(described[0], torch.Size):
        size, stride, dtype = described
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")
    return tuple(map(_like, described))


@cache
def _is_pure(func: Any) -> bool:
    """Whether what an operation gives shares no memory with what it is given, and it writes into none of that."""
    return not any(each.alias_info for each in (*func._schema.arguments, *func._schema.returns))


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A real mask as the numbers of what it chooses, one tensor a dimension."""
    is_mask = index is not None and index.dtype in (torch.bool, torch.uint8) and not index.is_meta
    return index.nonzero(as_tuple=True) if index is not None and is_mask else (index,)


class Trace(WithoutWeights):
    """Also says of every tensor from what it was computed, and how.

    Two tensors have the same name if and only if the same operations in the same order made them of parameters of the
    same names and of real tensors of the same values.

    Args:
        model: its parameters and buffers are named.
        names: name in the model's state dict -> another name to go by.
    """

    forgets = False

    def __init__(self, model: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__()
        self._made = WeakIdKeyDictionary()
        """Meta tensor -> its name when it was made."""
        self._written = WeakIdKeyDictionary()
        """Storage -> a name of all that was written into it in place."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta:
                self._made[tensor] = names.get(name, name)

    def name(self, tensor: Tensor) -> str:
        """Of what and how a tensor was made.

        Raises:
            KeyError: it is a meta tensor that was made elsewhere.
        """
        written = self._written.get(tensor.untyped_storage(), "")
        known = tensor.is_meta or tensor in self._made
        made = self._made[tensor] if known else _digest_of(tensor) + (_place(tensor) if written else "")
        return _digest(made, written)

    def call(self, func: Any, given: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        named = any(t.is_meta or t in self._made or t.untyped_storage() in self._written for t in given)
        names = [self.name(tensor) for tensor in given if named]
        output = _computed(func, args, kwargs)
        if not named and not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in pytree.tree_leaves(output)):
            return output  # its values say all
        leaves, _ = pytree.tree_flatten((args, kwargs))
        constants = ["" if isinstance(leaf, (Tensor, torch.device)) else str(leaf) for leaf in leaves]
        name = _digest(str(func), *names, *constants, *kwargs)
        into = [tensor for tensor, own in zip(given, _written(func, args, kwargs), strict=False) if own]
        for tensor in into:
            storage = tensor.untyped_storage()
            self._written[storage] = _digest(self._written.get(storage, ""), name, _place(tensor))
            if not tensor.is_meta:
                self._made[tensor] = name  # its own values say nothing any more
        for place, made in enumerate(pytree.tree_leaves(output)):
            if isinstance(made, Tensor) and not any(made is tensor for tensor in into):
                self._made[made] = _digest(name, str(place))
        return output


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[bool]:
    """For each tensor of a call, whether the operation writes into it."""
    found: list[bool] = []
    named = {argument.name: argument for argument in func._schema.arguments}
    for argument, value in [
        *zip(func._schema.arguments, args, strict=False),
        *((named[k], v) for k, v in kwargs.items()),
    ]:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        found += [writes for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _place(tensor: Tensor) -> str:
    """Where in its storage a tensor is."""
    return f"{tensor.storage_offset()} {tensor.shape} {tensor.stride()}"


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def _digest_of(tensor: Tensor) -> str:
    """Of a real tensor's values."""
    plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    values = plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return hashlib.blake2b(values + f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=12).hexdigest()
